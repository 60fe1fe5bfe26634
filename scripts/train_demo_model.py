"""Train the small language models that anybits is demonstrated and tested on.

The text is the source of Python's own standard library, so nothing has to be downloaded. Files are
assigned to training or held-out by a hash of their path: the split does not depend on the machine.

    python scripts/train_demo_model.py --out src/anybits/demo/model                 # the bundled Llama
    python scripts/train_demo_model.py --architecture qwen3 --out build/qwen3       # a second architecture

Freed memory goes back to the system on glibc, which makes CPU training several times slower; preload
an allocator that keeps it:  LD_PRELOAD=libjemalloc.so.2 python scripts/train_demo_model.py ...
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import shutil
import sysconfig
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

END = "<|endoftext|>"
# Generated tables, not code that a person wrote.
SKIPPED_FOLDERS = {"site-packages", "encodings", "pydoc_data", "__pycache__", "lib2to3"}
HELD_OUT_PERCENT = 4
HELD_OUT_BYTES = 400_000
CALIBRATION_BYTES = 600_000


@dataclass(frozen=True)
class Training:
    """Everything that, with the corpus, determines the trained weights."""

    architecture: str
    steps: int
    batch: int
    context: int
    learning_rate: float
    matrix_learning_rate: float
    seed: int
    vocabulary: int = 4096
    warmup: int = 40
    weight_decay: float = 0.1


def read_corpus() -> tuple[list[str], list[str], list[str]]:
    """Return (library, tests, held_out): texts of the standard library's .py files, sorted by path."""
    root = Path(sysconfig.get_paths()["stdlib"])
    library, tests, held_out = [], [], []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if SKIPPED_FOLDERS & set(relative.parts):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # deliberately broken files of the test suite
        if {"test", "tests", "idle_test"} & set(relative.parts):
            tests.append(text)
        elif int(hashlib.sha256(str(relative.as_posix()).encode()).hexdigest(), 16) % 100 < HELD_OUT_PERCENT:
            held_out.append(text)
        else:
            library.append(text)
    return library, tests, held_out


def train_tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer of `vocabulary` entries."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END, model_max_length=1024)


def build_model(settings: Training, end_id: int) -> PreTrainedModel:
    """Return a freshly initialised float32 model of the chosen architecture."""
    torch.manual_seed(settings.seed)
    common = dict(
        vocab_size=settings.vocabulary,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=end_id,
        eos_token_id=end_id,
        pad_token_id=end_id,
    )
    if settings.architecture == "llama":
        return LlamaForCausalLM(
            LlamaConfig(
                hidden_size=256,
                intermediate_size=768,
                num_hidden_layers=8,
                num_attention_heads=4,
                num_key_value_heads=2,
                **common,
            )
        )
    if settings.architecture == "qwen3-moe":
        return Qwen3MoeForCausalLM(
            Qwen3MoeConfig(
                hidden_size=256,
                num_hidden_layers=4,
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=64,
                num_experts=16,
                num_experts_per_tok=2,
                moe_intermediate_size=128,
                norm_topk_prob=True,
                output_router_logits=True,  # so that the loss keeps the experts evenly loaded
                router_aux_loss_coef=0.01,
                **common,
            )
        )
    return Qwen3ForCausalLM(
        Qwen3Config(
            hidden_size=384,
            intermediate_size=1024,
            num_hidden_layers=6,
            num_attention_heads=6,
            num_key_value_heads=2,
            head_dim=64,
            **common,
        )
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """Return all texts as one int64 tensor [tokens], each closed by the end token."""
    end = tokenizer.convert_tokens_to_ids(END)
    ids: list[int] = []
    for encoding in tokenizer.backend_tokenizer.encode_batch(texts):
        ids.extend(encoding.ids)
        ids.append(end)
    return torch.tensor(ids)


@torch.no_grad()
def perplexity(model: PreTrainedModel, ids: torch.Tensor, context: int, tokens: int) -> float:
    """Return the perplexity over the first `tokens` ids in windows of `context` without overlap."""
    model.eval()
    losses = [
        model(input_ids=window[None], labels=window[None]).loss.item()
        for window in ids[:tokens].split(context)
        if len(window) == context
    ]
    model.train()
    return math.exp(sum(losses) / len(losses))


def train(model: PreTrainedModel, ids: torch.Tensor, held_out: torch.Tensor, settings: Training) -> None:
    """Train in place: Muon for the matrices, AdamW for the rest, rates rising and then falling linearly."""
    generator = torch.Generator().manual_seed(settings.seed)
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    # Muon takes matrices: those of a stack of experts are parameters of their own in the same memory.
    stacks = {p: [torch.nn.Parameter(part) for part in p.detach()] for p in model.parameters() if p.ndim == 3}
    matrices += [part for parts in stacks.values() for part in parts]
    others = [p for n, p in model.named_parameters() if p.ndim == 1 or "embed" in n]
    optimizers = [
        torch.optim.Muon(matrices, lr=settings.matrix_learning_rate, weight_decay=settings.weight_decay),
        torch.optim.AdamW(others, lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]
    # Experts run one after another over the tokens that chose them: shapes that change at every step.
    if stacks:
        model.set_experts_implementation("eager")
    compiled = model if stacks else torch.compile(model)

    def rate(step: int) -> float:
        if step < settings.warmup:
            return (step + 1) / settings.warmup
        progress = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
        return 1.0 - 0.95 * progress

    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, rate) for optimizer in optimizers]
    started = time.time()
    model.train()
    for step in range(settings.steps):
        starts = torch.randint(0, len(ids) - settings.context, (settings.batch,), generator=generator)
        batch = torch.stack([ids[s : s + settings.context] for s in starts.tolist()])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = compiled(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for stack, parts in stacks.items():
            for part, gradient in zip(parts, stack.grad, strict=True):
                part.grad = gradient
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
        model.zero_grad(set_to_none=True)
        if (step + 1) % 50 == 0:
            speed = (step + 1) * batch.numel() / (time.time() - started)
            left = (settings.steps - step - 1) * batch.numel() / speed
            line = f"step {step + 1}/{settings.steps} loss {loss.item():.3f} {speed:.0f} tok/s {left:.0f} s left"
            if (step + 1) % 500 == 0:
                line += f" held-out ppl {perplexity(model, held_out, 512, 20_480):.3f}"
            print(line, flush=True)


def joined(texts: list[str], limit: int, seed: int) -> str:
    """Return texts in a seeded order, joined, cut at a line end before `limit` bytes."""
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)).tolist()
    text = "\n".join(texts[i] for i in order).encode("utf-8")[:limit].decode("utf-8", "ignore")
    return text[: text.rfind("\n") + 1]


def main() -> None:
    """Train, save the model in bfloat16 with its texts, and state the held-out perplexity."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--architecture", choices=["llama", "qwen3", "qwen3-moe"], default="llama")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=8, help="sequences a step")
    parser.add_argument("--context", type=int, default=512, help="tokens a sequence")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--matrix-learning-rate", type=float, default=0.02, help="of Muon")
    parser.add_argument("--seed", type=int, default=0)
    arguments = vars(parser.parse_args())
    out: Path = arguments.pop("out")
    settings = Training(**arguments)

    library, tests, held_out = read_corpus()
    text = library + library + tests  # the library counts twice: it is what the model is judged on
    tokenizer = train_tokenizer(library, settings.vocabulary)
    ids = encode(tokenizer, text)
    out.mkdir(parents=True, exist_ok=True)
    held_out_text = joined(held_out, HELD_OUT_BYTES, settings.seed)
    (out / "held_out.txt").write_text(held_out_text, encoding="utf-8")
    (out / "calibration.txt").write_text(joined(library, CALIBRATION_BYTES, settings.seed), encoding="utf-8")
    held_out_ids = torch.tensor(tokenizer(held_out_text)["input_ids"])
    model = build_model(settings, tokenizer.convert_tokens_to_ids(END))
    print(
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, "
        f"{len(ids) / 1e6:.2f} M training tokens, {len(held_out_ids)} held-out tokens",
        flush=True,
    )
    train(model, ids, held_out_ids, settings)

    model = model.to(torch.bfloat16)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    result = {
        "training": asdict(settings),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "corpus_sha256": hashlib.sha256("\0".join(text + held_out).encode()).hexdigest(),
        "training_tokens": len(ids),
        "held_out_tokens": len(held_out_ids),
        "held_out_perplexity": round(perplexity(model.float(), held_out_ids, 512, len(held_out_ids)), 4),
    }
    licence = Path(sysconfig.get_paths()["stdlib"]) / "LICENSE.txt"
    if licence.exists():  # the two texts are parts of Python
        shutil.copy(licence, out / "LICENSE-PSF.txt")
    (out / "training.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
