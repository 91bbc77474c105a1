"""`python -m training.generators.vae --config FILE --run RUN`"""

import sys

from sd_mini.config import command
from training.generators.vae.task import main

if __name__ == "__main__":
    sys.exit(command(main))
