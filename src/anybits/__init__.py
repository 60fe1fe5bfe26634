"""anybits: one LLM checkpoint of bit-planes, run at any precision from 2 to 8 bits."""

from anybits.errors import AnybitsError
from anybits.precision import precision

__version__ = "0.1.0"
__all__ = ["AnybitsError", "precision"]
