"""Time the kernels on this machine: benchmarks/kernels.py --shapes llama-3.1-8b --precisions 2-4 --rows 1,4,16."""

import argparse
from pathlib import Path

import torch

from anybits.evaluate.kernels import METHODS, SHAPES, KernelTiming, bench_kernels


def line(t: KernelTiming) -> str:
    return (
        f"{t.shape[0]:6d} x {t.shape[1]:5d}  m {t.m:3d}  {t.method:13s} p {t.precision}  {t.backend:9s} "
        f"{t.us:9.1f} us  {t.gb_per_s:6.1f} GB/s  {100 * t.bandwidth_share:4.0f} % of reading  "
        f"{t.speedup_vs_bf16:5.1f} x bf16"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", default="llama-3.1-8b", help=f"{', '.join(SHAPES)}, or NxK,NxK")
    parser.add_argument("--precisions", default="2-4")
    parser.add_argument("--rows", default="1", help="rows of x, comma-separated")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, default=None, help="write one JSON object a line here")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    rows, methods = [int(m) for m in args.rows.split(",")], args.methods.split(",")
    timings = bench_kernels(args.shapes, args.precisions, rows, methods, rounds=args.rounds, json_file=args.json)
    for timing in timings:
        print(line(timing), flush=True)


# Guarded, because transformers imports whatever is called `kernels` and finds this file first.
if __name__ == "__main__":
    main()
