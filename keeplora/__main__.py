"""``python -m keeplora``."""

import sys

from keeplora.cli import main

if __name__ == "__main__":
    sys.exit(main())
