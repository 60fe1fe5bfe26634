"""anybits in transformers: `from_pretrained` of a checkpoint, and precision on the model it returns.

The only file that imports transformers. Transformers loads everything that is not quantized; the planes
and their levels are read by `CheckpointReader`, which checks them and stops at `max_precision`.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MethodType
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import (  # noqa: F401
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.integrations.sdpa_attention import sdpa_attention_forward as sdpa_attention  # noqa: F401
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.pytorch_utils import Conv1D  # noqa: F401
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from anybits import checkpoint
from anybits.config import QUANT_METHOD, Single, StoredConfig
from anybits.decode.draft_length import DraftLength
from anybits.decode.schedule import Schedule
from anybits.decode.statistics import Statistics
from anybits.errors import AnybitsError
from anybits.integrations.locating import check_source
from anybits.integrations.swapping import (
    model_precision,
    plane_modules,
    swap_in_planes,
)
from anybits.precision import FIRST_PROFILE, ModelPrecision, Precision
from anybits.precision import precision as scoped
from anybits.quantize.targets import is_transposed, linear_shape
from anybits.weight import LEVEL_KINDS, PlaneWeight

logger = logging.getLogger(__name__)


@register_quantization_config(QUANT_METHOD)
class AnybitsConfig(QuantizationConfigMixin):
    """`quantization_config` of a checkpoint as transformers carries it, with the loading option max_precision."""

    def __init__(self, stored: StoredConfig, max_precision: Single | None = None) -> None:
        self.quant_method = QUANT_METHOD
        self.stored = stored if max_precision is None else stored.up_to(stored.planes_of(max_precision))
        self.on_disk = stored

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Build from config.json's object, which may also hold `max_precision`."""
        values = dict(config_dict)
        max_precision = values.pop("max_precision", None)
        config = cls(StoredConfig.from_dict(values), max_precision)
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """Return the object that config.json holds for the precisions in memory."""
        return self.stored.to_dict()

    def to_diff_dict(self) -> dict[str, Any]:
        """Return the whole object: nothing in it is a default."""
        return self.to_dict()

    def __repr__(self) -> str:
        return f"{type(self).__name__} {json.dumps(self.to_dict(), indent=2)}"


@register_quantizer(QUANT_METHOD)
class AnybitsQuantizer(HfQuantizer):
    """Swaps plane modules into the empty model before loading, and fills them after it."""

    requires_calibration = True  # a model is quantized by `anybits quantize`, not on the fly
    is_trainable = False

    def __init__(self, quantization_config: AnybitsConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.reader: checkpoint.CheckpointReader | None = None
        self.default = model_precision(quantization_config.stored)

    def is_serializable(self) -> bool:
        """Return True: `save_pretrained` writes the planes back as they are."""
        return True

    def _process_model_before_weight_loading(
        self,
        model: PreTrainedModel,
        dtype: torch.dtype | None = None,
        checkpoint_files: list[str] | None = None,
        **_: Any,
    ) -> PreTrainedModel:
        config: AnybitsConfig = self.quantization_config
        if not checkpoint_files or not checkpoint_files[0].endswith(".safetensors"):
            raise AnybitsError("an anybits checkpoint is read from safetensors files, and none were found")
        self.reader = checkpoint.CheckpointReader(map(Path, checkpoint_files), config.on_disk)
        self.reader.verify_unquantized()
        modules = swap_in_planes(model, config.stored, self.default, dtype)
        for name, module in modules.items():
            self.reader.check(name, module.out_features, module.in_features, config.stored.precisions)
        stray = sorted(set(self.reader.modules()) - set(modules))
        if stray:
            raise AnybitsError(
                f"{stray[0]} is stored as planes but config.json does not name it: the files belong to another model"
            )
        ours = {rf"\.(planes|({'|'.join(LEVEL_KINDS)})_\d)$"}  # read by `reader`, not by transformers
        model._keys_to_ignore_on_load_unexpected = set(model._keys_to_ignore_on_load_unexpected or ()) | ours
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        assert self.reader is not None
        precisions = self.quantization_config.stored.precisions
        modules = plane_modules(model)

        def read(name: str) -> PlaneWeight:
            assert self.reader is not None
            return self.reader.read(name, modules[name].in_features, precisions)

        # Reading is comparing with checksums: threads share that.
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            for (name, module), weight in zip(modules.items(), pool.map(read, modules), strict=True):
                module.set_plane_weight(weight.to(module.weight.device), self.reader.pages(name))
        model.anybits_bytes_read = self.reader.bytes_read
        self.reader = None
        attach_precision(model, self.default)
        from anybits.integrations import decode_step  # it builds on this module

        decode_step.use_decode_step(model)
        return model

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """Return the tensors to save, and the checksums that belong in the files' headers."""
        state = model.state_dict()
        return state, checkpoint.metadata(state)


def attach_precision(model: PreTrainedModel, default: ModelPrecision) -> None:
    """Give a model `set_precision(p)`, `generate(..., precision=p)`, `precisions`, `profiles`, `precision_codes`."""

    def set_precision(self: PreTrainedModel, value: Any) -> None:
        """Run at `value` wherever no `anybits.precision` scope says otherwise."""
        default.value = checked(value, default)

    lengths: dict[tuple[Single, Single], DraftLength] = {}
    static: list[Any] = []

    def decoders() -> Any:
        from anybits.integrations.static_decode import Decoders

        if not static:
            static.append(Decoders(default))
        return static[0]

    def generate(
        self: PreTrainedModel,
        *args: Any,
        precision: Any = None,
        draft_precision: Any = None,
        draft_tokens: int | None = None,
        schedule: Schedule | str | None = None,
        statistics: Statistics | None = None,
        static_cache: bool = False,
        **kwargs: Any,
    ) -> Any:
        """`GenerationMixin.generate` at `precision`: one precision or profile, or a list with one per sequence.

        draft_precision: draft there and verify at `precision`, with the same tokens when greedy and the same
        distribution when sampling; draft_tokens: how many a round, None for as many as pay. schedule: a Schedule or
        its text, in place of one precision. statistics: filled with what drafts or a schedule did. static_cache:
        decode in a cache of fixed size; on an NVIDIA GPU every step is then one captured CUDA graph, the same for
        all precisions, kept for later calls of like length. No cache is returned then.
        """
        if draft_precision is not None or schedule is not None or draft_tokens is not None:
            from anybits.integrations.generation import plan

            room = decoders() if static_cache else None
            passes = plan(default, lengths, precision, draft_precision, draft_tokens, schedule, statistics, room)
            passes.streamer = kwargs.get("streamer")
            return type(self).generate(self, *args, custom_generate=passes, **kwargs)
        if static_cache:
            from anybits.integrations.static_decode.generation import StaticPlan

            kwargs["custom_generate"] = StaticPlan(default, decoders(), kwargs.get("streamer"))
        scope = contextlib.nullcontext() if precision is None else scoped(checked(precision, default))
        with scope:
            return type(self).generate(self, *args, **kwargs)

    model.precisions, model.profiles, model.precision_codes = default.precisions, default.profiles, default.codes
    model.set_precision = MethodType(set_precision, model)
    if hasattr(model, "generate"):
        model.generate = MethodType(generate, model)


def checked(value: Any, default: ModelPrecision) -> Precision:
    """Return `value` (a precision, a list of them, or a tensor of codes) as a Precision whose every entry is stored."""
    if isinstance(value, torch.Tensor):
        for one in value.unique().tolist():
            if not FIRST_PROFILE <= one < FIRST_PROFILE + len(default.profiles):
                default.check(one)
        return value.to(torch.int32)
    return default.codes(value) if isinstance(value, list | tuple) else default.check(value)


def stored_config(path: str | Path) -> StoredConfig:
    """Return what the checkpoint at `path` says of itself; raise AnybitsError when it is not one."""
    if Path(path).is_dir():
        return checkpoint.read_stored_config(Path(path))
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise AnybitsError(f"{path} is neither a model folder nor a reachable hub name: {first_line(error)}") from None
    stored = getattr(config, "quantization_config", None)
    if not isinstance(stored, dict):
        raise AnybitsError(f"{path} is not quantized: give a folder that `anybits quantize` wrote")
    return StoredConfig.from_dict(stored)


def load_model(path: str | Path, max_precision: Single | None = None, **kwargs: Any) -> PreTrainedModel:
    """Load a quantized causal language model; with `max_precision` p only the bytes of p planes are read.

    A profile as `max_precision` stands for the highest precision that any matrix has under it.
    kwargs go to `from_pretrained` (dtype, device_map, ...). Raises AnybitsError for anything but an anybits
    checkpoint whose files are whole.
    """
    stored_config(path)
    config = AutoConfig.from_pretrained(path)
    if max_precision is not None:
        config.quantization_config["max_precision"] = max_precision
    with quiet_transformers():
        return AutoModelForCausalLM.from_pretrained(path, config=config, **kwargs)


def chosen_device(asked: str) -> str:
    """Return the device that `asked` means: auto is the GPU where there is one. AnybitsError when it is not here."""
    if asked == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(asked).type
    except RuntimeError:
        raise AnybitsError(f"device '{asked}' is unknown: choose auto, cpu or cuda") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise AnybitsError("no NVIDIA GPU was found: choose --device cpu")
    return asked


def float_config(path: str) -> Any:
    """Return the config of a float model (folder or hub name); raise AnybitsError when there is none."""
    check_source(path)
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise AnybitsError(f"{path} cannot be loaded as a causal language model: {first_line(error)}") from None
    refuse_quantized(path, config)
    return config


def load_float_model(path: str, **kwargs: Any) -> PreTrainedModel:
    """Load the float model that is to be quantized or compared with, in its stored dtype unless told otherwise."""
    float_config(path)
    with quiet_transformers():
        try:
            return AutoModelForCausalLM.from_pretrained(path, **kwargs)
        except Exception as error:  # a damaged file breaks safetensors, pickle or the model's own code
            if isinstance(error, MemoryError) or getattr(error, "errno", None) is not None:
                raise  # of this machine, not of the model
            raise AnybitsError(f"{path} cannot be loaded as a causal language model: {first_line(error)}") from None


def refuse_quantized(path: str, config: Any) -> None:
    """Raise AnybitsError when `config` says that the model at `path` is quantized."""
    if getattr(config, "quantization_config", None) is not None:
        raise AnybitsError(f"{path} is quantized already: give the original float model")


def empty_model(folder: Path) -> PreTrainedModel:
    """Build the causal language model that a folder's config.json describes, on the meta device, without weights."""
    with quiet_transformers():
        try:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            with torch.device("meta"):
                return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        except Exception as error:  # whatever a wrong value in the file breaks in the model's own code
            raise AnybitsError(f"{folder}/config.json describes no model: {first_line(error)}") from None


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model folder or hub name."""
    try:
        return AutoTokenizer.from_pretrained(path)
    except Exception as error:  # the tokenizers library raises Exception itself for a damaged file
        if Path(path).is_dir() and not any(Path(path).glob("*token*")) and not any(Path(path).glob("vocab*")):
            raise AnybitsError(f"{path} has no tokenizer: put tokenizer.json and its companions there") from None
        raise AnybitsError(f"{path} has no tokenizer that can be loaded: {first_line(error)}") from None


def first_line(error: Exception) -> str:
    """Return the first line of an error's text, or its kind."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' loading bars and notices off the terminal; its warnings about weights stay."""
    shown = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    dispatch = logging.getLogger("accelerate.big_modeling")  # says that weights are on disk, as they were told to be
    level = dispatch.level
    dispatch.setLevel(logging.ERROR)
    try:
        yield
    finally:
        dispatch.setLevel(level)
        if shown:
            transformers.utils.logging.enable_progress_bar()


def make_planes(model: nn.Module, weights: Mapping[str, PlaneWeight], stored: StoredConfig) -> None:
    """Turn a float model into a quantized one in place, from weights by module name."""
    default = model_precision(stored)
    dtype = next(model.parameters()).dtype
    for name, module in swap_in_planes(model, stored, default, dtype).items():
        module.set_plane_weight(weights[name])
    attach_precision(model, default)


def forget_quantization(model: PreTrainedModel) -> None:
    """Take from a model without plane modules what still calls it quantized, so that it saves as a plain one."""
    del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    model.__dict__.pop("quantization_method", None)


def register_attention(name: str, function: Callable[..., Any], like: str | None = None) -> None:
    """Let models be switched to `function` by `set_attn_implementation(name)`; like: whose masks it gets."""
    transformers.AttentionInterface.register(name, function)
    if like is not None:
        transformers.AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[like])


SHORTENABLE: set[type] = {DynamicLayer, DynamicSlidingWindowLayer}
"""Layers of a cache that hold keys and values which grow, and can forget the last of them."""


def can_be_shortened(cache: Any) -> bool:
    """Return whether positions can be taken off the end of `cache`."""
    layers = getattr(cache, "layers", None)
    return layers is not None and all(type(one) in SHORTENABLE for one in layers)


def has_window(cache: Any) -> bool:
    """Return whether a layer of `cache` has a sliding window."""
    return any(isinstance(one, DynamicSlidingWindowLayer) for one in cache.layers)


def generation_output(ids: torch.Tensor, cache: Any) -> GenerateDecoderOnlyOutput:
    """Return what `generate(return_dict_in_generate=True)` gives: ids `[1, T]` and the cache."""
    return GenerateDecoderOnlyOutput(sequences=ids, past_key_values=cache)


def generate_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    stream: bool = False,
    **passes: Any,
) -> tuple[str, int]:
    """Return the continuation of `prompt` and its number of tokens, at the active precision.

    temperature 0 is greedy; with `stream` the text is also written to the terminal as it comes; passes: what an
    anybits model's `generate` takes more than others (draft_precision, schedule, ...). Text ends where the model's
    context does, with a warning; a prompt that leaves no room in it raises AnybitsError, as an empty one does.
    """
    encoded = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
    if encoded["input_ids"].numel() == 0:
        raise AnybitsError("the prompt is empty: give at least one token to continue")
    max_new_tokens = _room(model, encoded["input_ids"].shape[1], max_new_tokens)
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    streamer = transformers.TextStreamer(tokenizer, skip_special_tokens=True) if stream else None
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    output = model.generate(
        **encoded, max_new_tokens=max_new_tokens, streamer=streamer, pad_token_id=padding, **sampling, **passes
    )
    new = output[0, encoded["input_ids"].shape[1] :]
    return tokenizer.decode(new, skip_special_tokens=True), len(new)


def context_length(model: PreTrainedModel) -> int | None:
    """Return the tokens that `model` was made for, prompt and answer together; None when its config does not say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def _room(model: PreTrainedModel, prompt: int, wanted: int) -> int:
    """Return how many of `wanted` new tokens fit behind `prompt` tokens into the model's context."""
    context = context_length(model) or prompt + wanted
    if prompt >= context:
        raise AnybitsError(f"the prompt has {prompt} tokens, and the model's context {context}: shorten the prompt")
    if wanted > context - prompt:
        logger.warning("%d new tokens at most: the model's context ends at %d tokens", context - prompt, context)
    return min(wanted, context - prompt)


def encoder(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], list[int]]:
    """Return text -> token ids, without special tokens and without the warning about long texts."""
    return lambda text: tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def plain_config(model: PreTrainedModel) -> dict[str, Any]:
    """Return the JSON object of a float model's config, as its own folder would hold it."""
    model.config.architectures = [type(model).__name__]
    return json.loads(model.config.to_json_string(use_diff=True))


def in_features(model: nn.Module, module: str) -> int:
    """Return K of the target `module` of a float model: of a linear layer or of a stack of experts."""
    parent, _, leaf = module.rpartition(".")
    holder = model.get_submodule(parent)
    found = getattr(holder, leaf)
    if isinstance(found, nn.Module):
        return linear_shape(found)[1]
    return int(found.shape[-2 if is_transposed(holder, leaf) else -1])


def save_companions(source: str, folder: Path, model: PreTrainedModel) -> None:
    """Write the tokenizer, when `source` has one, and the generation settings beside the weights."""
    with contextlib.suppress(AnybitsError):
        load_tokenizer(source).save_pretrained(folder)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)
