"""`python -m training.generators.autoregressive --config FILE --run RUN`"""

import sys

from sd_mini.config import command
from training.generators.autoregressive.task import main

if __name__ == "__main__":
    sys.exit(command(main))
