"""`python -m ppg_fast.cli`: the command line."""

import sys

from ppg_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
