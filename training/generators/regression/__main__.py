"""`python -m training.generators.regression --config FILE --run RUN`"""

import sys

from sd_mini.config import command
from training.generators.regression.task import main

if __name__ == "__main__":
    sys.exit(command(main))
