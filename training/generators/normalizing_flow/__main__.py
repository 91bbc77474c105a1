"""`python -m training.generators.normalizing_flow --config FILE --run RUN`"""

import sys

from sd_mini.config import command
from training.generators.normalizing_flow.task import main

if __name__ == "__main__":
    sys.exit(command(main))
