"""``python -m lightning_cwrf``: the command ``cwrf``."""

import sys

from lightning_cwrf.commands import main

if __name__ == "__main__":
    sys.exit(main())
