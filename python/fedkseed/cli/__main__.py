"""`python -m fedkseed.cli`."""

from __future__ import annotations

import sys

from fedkseed.cli import main

if __name__ == "__main__":
    sys.exit(main())
