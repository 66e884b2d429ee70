"""``python -m sipit_lite``: the command line."""

import sys

from sipit_lite.cli import main

if __name__ == "__main__":
    sys.exit(main())
