"""The README of a quantized model: what it is, how to run it, and what each precision reads."""

from __future__ import annotations

from anybits.config import StoredConfig


def model_card(name: str, source: str, stored: StoredConfig, facts: dict[int, tuple[int, int]]) -> str:
    """Return the model card; facts: precision -> (bytes read, number of quantized weights)."""
    rows = "\n".join(
        f"| {p} | {size / 1e6:.1f} MB | {8 * size / count:.3f} |" for p, (size, count) in sorted(facts.items())
    )
    lowest, highest = stored.precisions[0], stored.precisions[-1]
    group = f", group size {stored.group_size}" if stored.group_size is not None else ""
    return f"""---
library_name: transformers
tags: [anybits, quantized]
base_model: {source}
---
# {name}

`{source}` quantized once by anybits ({stored.method}{group}) and runnable at every precision from
{lowest} to {highest} bits from one copy of the weights.

```python
import anybits                     # needed: it teaches transformers to read this checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
inputs = tokenizer("def fib(n):", return_tensors="pt")
model.generate(**inputs, precision={lowest})   # this call at {lowest} bits
with anybits.precision({highest}):             # everything in here at {highest} bits
    model.generate(**inputs)
```

| precision | quantized weights read | bits a weight |
|---|---|---|
{rows}

Made with: `{stored.recipe}`
"""
