"""Time the kernels on this machine: benchmarks/kernels.py --shapes llama-3.1-8b --precisions 2-4 --rows 1,4,16."""

import argparse
from pathlib import Path

import torch

from anybits.evaluate.kernels import METHODS, SHAPES, bench_kernels

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
rows = [int(m) for m in args.rows.split(",")]
for t in bench_kernels(
    args.shapes, args.precisions, rows, args.methods.split(","), rounds=args.rounds, json_file=args.json
):
    print(
        f"{t.shape[0]:6d} x {t.shape[1]:5d}  m {t.m:3d}  {t.method:13s} p {t.precision}  {t.backend:8s} {t.us:9.1f} us  "
        f"{t.gb_per_s:6.1f} GB/s  {100 * t.bandwidth_share:4.0f} % of reading  {t.speedup_vs_bf16:5.1f} x bf16"
    )
