"""``python -m fastmerge``."""

import sys

from fastmerge.cli import main

if __name__ == "__main__":
    sys.exit(main())
