"""anybits: one LLM checkpoint of bit-planes, run at any precision from 2 to 8 bits.

Importing it teaches transformers to load anybits checkpoints: at once, or when transformers is imported later. It
imports neither torch nor transformers by itself, so that the command line answers at once.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from anybits.config import DataAware, Recipe
from anybits.errors import AnybitsError
from anybits.precision import precision
from anybits.registration import when_imported

if TYPE_CHECKING:
    from anybits.integrations.quantizing import quantize_model as quantize
    from anybits.integrations.transformers import load_model as load

__version__ = "0.1.0"
__all__ = ["AnybitsError", "DataAware", "Recipe", "__version__", "load", "precision", "quantize"]

_LATER = {
    "load": ("anybits.integrations.transformers", "load_model"),
    "quantize": ("anybits.integrations.quantizing", "quantize_model"),
}


def __getattr__(name: str) -> Any:
    """Import what needs torch and transformers when it is first asked for (PEP 562)."""
    if name not in _LATER:
        raise AttributeError(f"module 'anybits' has no attribute {name!r}")
    module, attribute = _LATER[name]
    value = globals()[name] = getattr(import_module(module), attribute)
    return value


# A package puts its name here when it is first loaded: now, so that it never hides the function `quantize`.
import_module("anybits.quantize")
del globals()["quantize"]
when_imported("transformers", "anybits.integrations.transformers")
