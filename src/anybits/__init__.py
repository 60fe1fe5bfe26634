"""anybits: one LLM checkpoint of bit-planes, run at any precision from 2 to 8 bits.

Importing it teaches transformers to load anybits checkpoints.
"""

__version__ = "0.1.0"

from anybits.config import DataAware, Recipe
from anybits.errors import AnybitsError
from anybits.integrations.quantizing import quantize_model as quantize
from anybits.integrations.transformers import load_model as load
from anybits.precision import precision

__all__ = ["AnybitsError", "DataAware", "Recipe", "__version__", "load", "precision", "quantize"]
