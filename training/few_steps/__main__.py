"""`python -m training.few_steps --config FILE --run RUN`"""

import sys

from sd_mini.config import command
from training.few_steps.task import main

if __name__ == "__main__":
    sys.exit(command(main))
