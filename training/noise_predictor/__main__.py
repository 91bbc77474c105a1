"""`python -m training.noise_predictor --config FILE --run RUN`"""

import sys

from sd_mini.config import command
from training.noise_predictor.task import main

if __name__ == "__main__":
    sys.exit(command(main))
