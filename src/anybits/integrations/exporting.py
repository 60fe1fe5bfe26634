"""One precision of a checkpoint as an ordinary dense model that any tool loads: what `anybits export` does."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from anybits.config import Single
from anybits.errors import AnybitsError
from anybits.integrations import transformers as hf
from anybits.linear import PlaneLinear, PlaneModule, PlaneStack

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def export_model(folder: str | Path, out: str | Path, precision: Single, dtype: str = "bfloat16") -> None:
    """Write the dequantized model at `precision`, a number or a profile, into folder `out` as safetensors of `dtype`.

    Transformers and all that reads its folders load it without anybits. Raises AnybitsError for a precision
    that is not stored, an unknown dtype, and an `out` that is not empty.
    """
    if dtype not in DTYPES:
        raise AnybitsError(f"dtype '{dtype}' is unknown: choose {', '.join(DTYPES)}")
    target = Path(out)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise AnybitsError(f"{target} is not empty: choose another folder or remove it first")
    stored = hf.stored_config(folder)
    precision = stored.check_single(precision)
    model = hf.load_model(folder, max_precision=precision, dtype=DTYPES[dtype])
    make_dense(model, precision)
    with hf.quiet_transformers():
        model.save_pretrained(target)
    hf.save_companions(str(folder), target, model)
    name = Path(folder).name
    text = (
        f"# {name} at {precision} bits\n\nThe dequantized {dtype} weights of `{name}` ({stored.method}), by anybits.\n"
    )
    (target / "README.md").write_text(text, encoding="utf-8")


def make_dense(model: nn.Module, precision: Single) -> None:
    """Replace every plane module of a loaded model, in place, by the dense matrix of `precision` in its dtype."""
    for name, module in hf.plane_modules(model).items():
        parent, _, leaf = name.rpartition(".")
        holder = model.get_submodule(parent)
        delattr(holder, leaf)
        setattr(holder, leaf, _dense(module, precision))
    hf.forget_quantization(model)


def _dense(module: PlaneModule, precision: Single) -> nn.Module | nn.Parameter:
    own = module.own_precision(precision)
    assert isinstance(own, int)
    matrix = module.plane_weight.dequantize(own).to(module.weight.dtype)
    if isinstance(module, PlaneStack):
        stack = matrix.view(module.experts, module.rows, -1)
        return nn.Parameter(stack.mT.contiguous() if module.transposed else stack, requires_grad=False)
    assert isinstance(module, PlaneLinear)
    with torch.device("meta"):
        linear = nn.Linear(module.in_features, module.out_features, bias=False)
        if module.transposed:
            linear = hf.Conv1D(module.out_features, module.in_features)
    linear.weight = nn.Parameter(matrix.T.contiguous() if module.transposed else matrix, requires_grad=False)
    if module.bias is not None:
        linear.bias = module.bias
    return linear
