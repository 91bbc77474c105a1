"""`python -m training.benchmarks NAME ...`"""

import sys

from sd_mini.config import command
from training.benchmarks.runner import main

if __name__ == "__main__":
    sys.exit(command(main))
