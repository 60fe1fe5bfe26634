"""The README of a quantized model: what it is, how to run it, and what each precision reads."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import dropwhile

from anybits.config import Single, StoredConfig, precision_order

TABLE_HEAD = "| precision | quantized weights read | bits a weight |\n|---|---|---|"


def bytes_table(facts: Mapping[Single, tuple[int, int]]) -> str:
    """Return the card's table; facts: precision or profile -> (bytes read, number of quantized weights)."""
    rows = [
        f"| {p} | {facts[p][0] / 1e6:.1f} MB | {8 * facts[p][0] / facts[p][1]:.3f} |"
        for p in sorted(facts, key=precision_order)
    ]
    return "\n".join([TABLE_HEAD, *rows])


def with_table(card: str, facts: Mapping[Single, tuple[int, int]]) -> str:
    """Return a model card with its table made anew, or with a table at its end where there was none."""
    before, head, after = card.partition(TABLE_HEAD)
    if not head:
        return f"{card.rstrip()}\n\n{bytes_table(facts)}\n"
    lines = after.lstrip("\n").splitlines(keepends=True)
    rest = "".join(dropwhile(lambda line: line.startswith("|"), lines))
    return f"{before}{bytes_table(facts)}\n{rest}"


def model_card(name: str, source: str, stored: StoredConfig, facts: dict[Single, tuple[int, int]]) -> str:
    """Return the model card; facts: precision -> (bytes read, number of quantized weights)."""
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

{bytes_table(facts)}

Made with: `{stored.recipe}`
"""
