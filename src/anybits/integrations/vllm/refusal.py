"""What stands in for the plugin in a vLLM that it does not know: a checkpoint is refused with the reason."""

from __future__ import annotations

from typing import Any

from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from anybits.config import QUANT_METHOD
from anybits.errors import AnybitsError


def refuse(reason: str) -> None:
    """Register the quantization method `anybits` so that loading a checkpoint raises AnybitsError(reason)."""
    if QUANT_METHOD in QUANTIZATION_METHODS:
        return

    @register_quantization_config(QUANT_METHOD)
    class Refused(QuantizationConfig):
        """Raises at the first question that vLLM asks about a checkpoint."""

        @classmethod
        def from_config(cls, config: dict[str, Any]) -> QuantizationConfig:
            raise AnybitsError(reason)

        def get_name(self) -> str:
            return QUANT_METHOD

        def get_supported_act_dtypes(self) -> list[Any]:
            return []

        @classmethod
        def get_min_capability(cls) -> int:
            return 0

        @staticmethod
        def get_config_filenames() -> list[str]:
            return []

        def get_quant_method(self, layer: Any, prefix: str) -> None:
            return None
