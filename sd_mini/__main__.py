"""`python -m sd_mini ...` is `sd-mini ...`."""

import sys

from sd_mini.cli.commands import main

if __name__ == "__main__":
    sys.exit(main())
