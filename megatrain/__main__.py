"""`python -m megatrain`: the command line."""

import sys

from megatrain.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
