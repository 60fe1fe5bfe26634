"""Measure how far each way to quantize leaves a model from its float self: JSON lines, one a variant and seed.

    python benchmarks/accuracy.py --model MODEL --calibration train.txt --text held_out.txt --out accuracy.jsonl

The gap at a precision is ln perplexity minus that of the float model on the same windows, the divergence (kl) the mean
Kullback-Leibler divergence of the next-token distribution from the float model's. Seeds choose the calibration
windows; all variants of a seed see the same ones. A variant that is in the output already is skipped, so a stopped run
goes on. `--table` prints medians and spreads of a finished file as Markdown.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from common import about_run

import anybits
from anybits.checkpoint import CheckpointReader, checkpoint_files
from anybits.config import DataAware, Recipe, StoredConfig, parse_precisions
from anybits.evaluate.perplexity import Score, log_probabilities, split_windows
from anybits.integrations import swapping
from anybits.integrations import transformers as hf
from anybits.quantize import layerwise, pipeline
from anybits.quantize.blocks import BlockRunner, capture
from anybits.quantize.calibration import Calibration, sample_windows
from anybits.quantize.targets import find_blocks, find_targets, matrix
from anybits.weight import AffineLevels, PlaneWeight, group_columns, group_count

Dense = dict[int, dict[str, torch.Tensor]]
"""Precision -> parameter name -> the matrix that takes its place."""


@dataclass(frozen=True)
class Job:
    """The model and what a variant may use of it."""

    model: torch.nn.Module
    calibration: Calibration
    recipe: Recipe


def run_recipe(job: Job) -> Dense:
    """Quantize as `anybits quantize` does, into a folder that is thrown away."""
    config = hf.plain_config(job.model)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        text = job.calibration if job.recipe.needs_text else None
        stored = pipeline.quantize(job.model, config, job.recipe, text, out, anybits.__version__)
        return read_back(job.model, out, stored)


def read_back(model: torch.nn.Module, folder: Path, stored: StoredConfig) -> Dense:
    """Return the dequantized matrices of a finished checkpoint."""
    reader = CheckpointReader(checkpoint_files(folder), stored)
    prefix, blocks = find_blocks(model)
    dense: Dense = {p: {} for p in stored.precisions}
    for index, block in enumerate(blocks):
        for target in find_targets(block):
            where = f"{prefix}.{index}"
            weight = reader.read(f"{where}.{target.module}", target.in_features, stored.precisions)
            for p in stored.precisions:
                dense[p][f"{where}.{target.parameter}"] = weight.dequantize(p)
    return dense


def nearest(weight: torch.Tensor, p: int, group_size: int) -> PlaneWeight:
    """Round to the nearest of 2**p equal steps between each group's least and greatest value."""
    from anybits import bits

    rows, columns = weight.shape
    size, groups = group_columns(group_size, columns), group_count(group_size, columns)
    parts = weight.split(size, dim=1)
    low = torch.stack([part.amin(1) for part in parts], 1)
    step = (torch.stack([part.amax(1) for part in parts], 1) - low).clamp_min(1e-8) / (2**p - 1)
    offset = (low + step * (2**p - 1) / 2).half()
    scales = torch.stack([(step * 2.0 ** (p - 2 - i)).half() for i in range(p)])
    spread = [t.float().repeat_interleave(size, 1)[:, :columns] for t in (low, step)]
    codes = ((weight - spread[0]) / spread[1]).round().clamp(0, 2**p - 1).to(torch.uint8)
    assert scales.shape == (p, rows, groups)
    return PlaneWeight(bits.codes_to_planes(codes, p), columns, AffineLevels(group_size, {p: scales}, {p: offset}))


def uniform(job: Job, settings: DataAware | None) -> Dense:
    """Quantize to equal steps at each precision alone: round to nearest, or GPTQ when `settings` say so."""
    dense: Dense = {}
    prefix, blocks = find_blocks(job.model)
    batches = list(job.calibration.tokens.split(job.recipe.batch))
    inputs = capture(job.model, blocks, batches)
    for p in job.recipe.precisions:
        dense[p], path = {}, inputs.hidden
        for index, block in enumerate(blocks):
            runner = BlockRunner(block, inputs.arguments[index])
            targets = find_targets(block)
            found = {
                t.module: nearest(matrix(block.get_parameter(t.parameter)), p, job.recipe.group_size) for t in targets
            }
            if settings is not None:
                found = layerwise.improve_block(runner, targets, found, path, {p: path}, settings)
            replaced = {t.parameter: found[t.module].dequantize(p) for t in targets}
            dense[p].update({f"{prefix}.{index}.{name}": value for name, value in replaced.items()})
            if settings is not None:
                path = runner.run_all(path, lambda replaced=replaced: replaced)
    return dense


def alone(job: Job) -> Dense:
    """Quantize at each precision by itself: what sharing planes costs is the difference."""
    dense: Dense = {}
    for p in job.recipe.precisions:
        dense |= run_recipe(replace(job, recipe=replace(job.recipe, precisions=(p,))))
    return dense


NO_DATA = {"preset": "default", "data_aware": None}
PUBLISHED = {"preset": "best", "data_aware": None, "distillation_steps": 0}
OURS = DataAware()
PLAIN = DataAware(balancing=0, feedback=False, descents=0, refit_sweeps=0, codebook_iterations=0, correction=0.0)
GPTQ = replace(PLAIN, feedback=True)
NO_EXPERTS = {"data_aware": replace(OURS, experts=False)}

Variant = tuple[Callable[[Job], Dense], dict[str, object]]
VARIANTS: dict[str, Variant] = {
    "round to nearest": (lambda job: uniform(job, None), {}),
    "GPTQ": (lambda job: uniform(job, GPTQ), {}),
    "AnyBCQ, codes only": (run_recipe, NO_DATA),
    "AnyBCQ as published": (run_recipe, PUBLISHED),
    "AnyBCQ as published, alone": (alone, PUBLISHED),
    "+ refit": (run_recipe, {"data_aware": replace(PLAIN, refit_sweeps=2)}),
    "+ joint feedback": (run_recipe, {"data_aware": replace(GPTQ, refit_sweeps=2)}),
    "+ descent": (run_recipe, {"data_aware": replace(OURS, balancing=0, correction=0.0)}),
    "+ balanced start": (run_recipe, {"data_aware": replace(OURS, correction=0.0)}),
    "ours, default": (run_recipe, {}),
    "ours, default, 8-bit scales": (run_recipe, {"scale_bits": 8}),
    "ours, default, alone": (alone, {}),
    "ours, default, experts data-free": (run_recipe, NO_EXPERTS),
    "+ block reconstruction": (run_recipe, {"preset": "best", "distillation_steps": 0}),
    "+ end-to-end tuning": (run_recipe, {"preset": "best", "steps": 0}),
    "ours, best": (run_recipe, {"preset": "best"}),
    "ours, best, alone": (alone, {"preset": "best"}),
    "Any-Precision as published": (run_recipe, {"method": "any-precision", "data_aware": None}),
    "Any-Precision as published, alone": (alone, {"method": "any-precision", "data_aware": None}),
    "Any-Precision, ours": (run_recipe, {"method": "any-precision"}),
    "Any-Precision, ours, experts data-free": (run_recipe, {"method": "any-precision", **NO_EXPERTS}),
    "Any-Precision, ours, alone": (alone, {"method": "any-precision"}),
}


@dataclass
class Yardstick:
    """The held-out windows, int64 `[1, T]` each, and what the float model says of them."""

    model: torch.nn.Module
    windows: list[torch.Tensor]

    @torch.no_grad()
    def __post_init__(self) -> None:
        """Run the float model."""
        self.expected, total = [], Score()
        for window in self.windows:
            logits = self.model(input_ids=window, use_cache=False).logits
            self.expected.append(log_probabilities(logits))
            total.add(logits, window, None)
        self.ln_perplexity = total.nll / total.tokens

    @torch.no_grad()
    def measure(self, dense: Dense) -> dict[str, float]:
        """Return gap_p and kl_p with each precision's matrices in place, in nats a token."""
        kept = {name: self.model.get_parameter(name).clone() for name in next(iter(dense.values()))}
        found = {}
        for p, matrices in dense.items():
            for name, value in matrices.items():
                self.model.get_parameter(name).copy_(value.view(kept[name].shape))
            total = Score()
            for window, expected in zip(self.windows, self.expected, strict=True):
                total.add(self.model(input_ids=window, use_cache=False).logits, window, expected)
            found[f"gap_{p}"] = round(total.nll / total.tokens - self.ln_perplexity, 6)
            found[f"kl_{p}"] = round(total.kl_divergence, 6)
        for name, value in kept.items():
            self.model.get_parameter(name).copy_(value)
        return dict(sorted(found.items()))


def measure(arguments: argparse.Namespace) -> None:
    """Run every variant that was asked for and is not in the output yet."""
    model = hf.load_float_model(arguments.model, dtype=torch.float32)
    swapping.run_experts_eagerly(model)
    encode = hf.encoder(hf.load_tokenizer(arguments.model))
    windows = split_windows(encode(Path(arguments.text).read_text("utf-8")), 512, arguments.max_tokens)
    text = Path(arguments.calibration).read_text("utf-8")
    label = arguments.name or f"{Path(arguments.model).resolve().name} ({model.config.model_type})"
    done = {(r["model"], r["variant"], r["precisions"], r["seed"]) for r in read(arguments.out)}
    started = time.monotonic()
    yardstick = Yardstick(model, windows)
    for seed in arguments.seeds:
        calibration = sample_windows([text], encode, arguments.samples, 512, seed, "calibration text")
        for name in arguments.variants or VARIANTS:
            run, changes = VARIANTS[name]
            if (label, name, arguments.precisions, seed) in done:
                continue
            if time.monotonic() - started > 60 * arguments.minutes:
                print(f"{arguments.minutes} minutes are over: repeat the command to go on")
                return
            precisions = parse_precisions(arguments.precisions)
            settings = {"samples": arguments.samples, "steps": arguments.steps, "scale_bits": 16}
            settings["distillation_steps"] = arguments.distillation_steps
            start = Recipe(precisions=precisions, seed=seed, **settings)
            recipe = replace(start, **changes)
            worked = time.process_time()
            dense = run(Job(model, calibration, recipe))
            worked = time.process_time() - worked
            line = {
                "table": f"held-out gaps in ln perplexity, precisions {arguments.precisions}",
                "model": label,
                "variant": name,
                "precisions": arguments.precisions,
                "seed": seed,
                **yardstick.measure(dense),
                "cpu_seconds": round(worked, 1),
                "samples": arguments.samples,
                "steps": arguments.steps,
                **({"distillation_steps": recipe.distillation_steps} if recipe.distils else {}),
                "text_tokens": sum(w.numel() for w in windows),
                **about_run(),
            }
            append(arguments.out, line)
            shown = "  ".join(f"{p}: {line[f'gap_{p}']:+.4f}" for p in precisions)
            print(f"{name:36s} seed {seed}  {shown}  {worked:.0f} CPU s", flush=True)


def append(path: Path, line: dict) -> None:
    """Add a line to an output file, on its own even where a killed run left half of one."""
    with path.open("a+b") as file:
        if file.tell():
            file.seek(-1, 2)
            file.write(b"" if file.read(1) == b"\n" else b"\n")
        file.write(json.dumps(line).encode() + b"\n")


def read(path: Path) -> list[dict]:
    """Return the lines of an output file, none where there is no file; a line cut short by a kill does not count."""
    found = []
    for line in path.read_text("utf-8").splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            print(f"{path}: left out a line that was cut short")
    return found


def table(lines: list[dict], key: str) -> str:
    """Return each model's median of each variant and precision with the seeds' least and greatest, as Markdown.

    key: gap or kl. In brackets the median ratio to the method as published, seed by seed where both were measured.
    """
    parts = []
    for model, stored in dict.fromkeys((line["model"], line["precisions"]) for line in lines):
        own = [line for line in lines if (line["model"], line["precisions"]) == (model, stored)]
        precisions = parse_precisions(stored)
        head = f"| {model}, {key} | " + " | ".join(f"{p} bits" for p in precisions) + " | CPU seconds |"
        rows = [head, "|---" * (len(precisions) + 2) + "|"]
        for name in dict.fromkeys(line["variant"] for line in own):
            found = [line for line in own if line["variant"] == name]
            cells = [_cell(found, own, f"{key}_{p}") for p in precisions]
            seconds = statistics.median(line["cpu_seconds"] for line in found)
            rows.append(f"| {name} | " + " | ".join(cells) + f" | {seconds:.0f} |")
        parts.append("\n".join(rows))
    return "\n\n".join(parts)


def _cell(found: list[dict], own: list[dict], key: str) -> str:
    values = [line[key] for line in found if key in line]
    if not values:
        return ""
    method = "Any-Precision as published" if "Any-Precision" in found[0]["variant"] else "AnyBCQ as published"
    base = {line["seed"]: line.get(key) for line in own if line["variant"] == method}
    ratios = [line[key] / base[line["seed"]] for line in found if key in line and base.get(line["seed"])]
    spread = f" ({min(values):.4f} to {max(values):.4f})" if len(values) > 1 else ""
    ratio = f" [{statistics.median(ratios):.2f}]" if ratios and found[0]["variant"] != method else ""
    return f"{statistics.median(values):.4f}{spread}{ratio}"


def main() -> None:
    """Read the arguments and measure, or print the table of what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of the float model")
    parser.add_argument("--name", help="the model's name in the output (default: folder and architecture)")
    parser.add_argument("--calibration", help="text file for calibration")
    parser.add_argument("--text", help="text file to predict, apart from the calibration text")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines, appended to")
    parser.add_argument("--precisions", default="2-4")
    parser.add_argument("--variants", nargs="*", choices=list(VARIANTS), help="default: all")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--samples", type=int, default=128, help="calibration windows of 512 tokens")
    parser.add_argument("--steps", type=int, default=200, help="of block reconstruction, where a variant has it")
    parser.add_argument("--distillation-steps", type=int, default=200, help="of end-to-end tuning, the same")
    parser.add_argument("--max-tokens", type=int, default=24_576, help="of the text to predict")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no variant after this long")
    parser.add_argument("--table", action="store_true", help="print the table of --out and measure nothing")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    if arguments.table:
        print(table(read(arguments.out), "gap"), table(read(arguments.out), "kl"), sep="\n\n")
    else:
        measure(arguments)


if __name__ == "__main__":
    main()
