"""`python -m mm_sparse.cli`, as torchrun starts it."""

import sys

from mm_sparse.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
