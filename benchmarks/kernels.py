"""Time the kernels on this machine: `anybits bench` as a script, with the same options (--help lists them)."""

# Everything is guarded: transformers asks for a package called `kernels` and, run from here, finds this file.
if __name__ == "__main__":
    import sys

    from anybits.cli import main

    main(["bench", *sys.argv[1:]])
