"""`python -m countermark`."""

import sys

from countermark.cli import main

if __name__ == "__main__":
    sys.exit(main())
