"""Decoding in a KV cache of fixed size, whose steps a GPU replays as CUDA graphs (docs/cuda.md)."""

from anybits.integrations.static_decode.decoder import Decoders, StaticDecoder, refusal

__all__ = ["Decoders", "StaticDecoder", "refusal"]
