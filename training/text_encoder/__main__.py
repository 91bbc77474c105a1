"""`python -m training.text_encoder --config FILE --run RUN`"""

import sys

from sd_mini.config import command
from training.text_encoder.task import main

if __name__ == "__main__":
    sys.exit(command(main))
