"""Time the kernels on this machine: `anybits bench` as a script, with the same options (--help lists them)."""

import sys

from anybits.cli import main

# Guarded, because transformers imports whatever is called `kernels` and finds this file first.
if __name__ == "__main__":
    main(["bench", *sys.argv[1:]])
