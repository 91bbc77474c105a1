"""`python -m training.generators.prior --config FILE --run RUN`"""

import sys

from sd_mini.config import command
from training.generators.prior.task import main

if __name__ == "__main__":
    sys.exit(command(main))
