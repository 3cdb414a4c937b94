"""`python -m wsl_d2` is `wsl-d2`."""

import sys

from wsl_d2.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
