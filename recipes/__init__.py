"""Training recipes."""

import sys

from mm_sparse._extras import explain_missing

# `python -m` of one of the programs, before the program itself is imported.
if sys.argv[:1] == ["-m"]:
    sys.excepthook = explain_missing
