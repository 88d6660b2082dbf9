"""``python -m lightning_gr`` is the command ``lightning-gr``."""

import sys

from lightning_gr.cli import main

if __name__ == "__main__":
    sys.exit(main())
