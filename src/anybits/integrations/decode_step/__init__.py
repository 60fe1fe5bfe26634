"""What makes a loaded model's decode steps fast on a CPU beside its products: attention, cache, norms, output layer."""

from __future__ import annotations

from typing import Any

from anybits.integrations.decode_step.attention import use_decode_attention
from anybits.integrations.decode_step.attention_layers import use_step_attention
from anybits.integrations.decode_step.cache import use_growing_cache
from anybits.integrations.decode_step.layers import use_step_layers
from anybits.integrations.decode_step.modules import use_step_modules


def use_decode_step(model: Any) -> None:
    """Prepare `model` for decode steps; what it computes stays the same up to rounding."""
    use_decode_attention(model)
    use_growing_cache(model)
    use_step_modules(model)
    use_step_attention(model)
    use_step_layers(model)
