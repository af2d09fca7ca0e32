"""Reads a target's shape and tokenizer from its folder, so that bad input is rejected before its weights load."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GenerationConfig,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES

from draftsmith.loading import remote_code
from draftsmith.loading.target_names import model_folder, nearest_name

NO_LIMIT = 2**30
"""Context length of a model whose positions are unlimited."""


@dataclass(frozen=True, kw_only=True)
class TargetInfo:
    """A target's name, shape and tokenizer, under the attribute names of `Target`."""

    name: str
    tokenizer: Any
    vocab_size: int
    num_layers: int
    hidden_size: int
    context_length: int
    is_encoder_decoder: bool
    decoder_start_token_id: int | None
    """First token of an encoder-decoder's output; None for a causal model, or if no config names one."""
    is_quantised: bool
    eos_token_ids: tuple[int, ...] = ()
    """The end-of-sequence ids of the generation config; empty if it has none."""
    fingerprint: None = None
    """Unknown without the weights."""

    @property
    def tokenizer_hash(self) -> str | None:
        """A hash of the tokenizer's vocabulary, None without a tokenizer."""
        return tokenizer_hash(self.tokenizer)


def read_target_info(path: str) -> TargetInfo:
    """Reads config and tokenizer of a transformers folder, GGUF file, named target or hub name, without the weights.

    Of a GGUF file they are converted once, into the cache folder; `$DRAFTSMITH_OFFLINE=1` forbids the hub and fetching.
    Raises ValueError if there is no model, if its tokenizer is damaged, or if it needs code of its own that the user
    has not allowed.
    """
    name, path = path, model_folder(path, needs_weights=False)
    if Path(path).is_dir() and not (Path(path) / "config.json").is_file():
        if (Path(path) / "adapter_config.json").is_file():
            raise ValueError(
                f"target folder {path} has adapters of PEFT without their model; save it with them merged"
                " (merge_and_unload), or pass the PeftModel to draftsmith.Target"
            )
        raise ValueError(
            f"target folder {path} has no config.json; name a transformers model folder or one with a GGUF file"
        )
    if not Path(path).is_dir() and os.environ.get("DRAFTSMITH_OFFLINE") == "1":
        raise ValueError(
            f"target {path!r} is not a local folder, and DRAFTSMITH_OFFLINE=1 disables access to the hub"
            f"{nearest_name(path)}"
        )
    try:
        whole = AutoConfig.from_pretrained(path, trust_remote_code=remote_code.is_allowed())
    except Exception as error:  # transformers raises many kinds for values that are missing or wrong
        raise ValueError(f"target {path!r} cannot be read: {remote_code.reason(error)}{nearest_name(path)}") from None
    tokenizer = _tokenizer(path)
    config, generation_config = whole.get_text_config(decoder=True), _generation_config(path)
    return TargetInfo(
        name=name,
        tokenizer=tokenizer,
        vocab_size=config.vocab_size,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        context_length=context_length(config),
        is_encoder_decoder=bool(whole.is_encoder_decoder),
        is_quantised=getattr(whole, "quantization_config", None) is not None,
        decoder_start_token_id=decoder_start(whole, generation_config) if whole.is_encoder_decoder else None,
        # A model without a generation config makes one of its configuration.
        eos_token_ids=end_tokens(config if generation_config is None else generation_config),
    )


def _tokenizer(path: str) -> Any:
    """Returns the tokenizer, None if there is none; raises ValueError if its files cannot be read."""
    names = [file.name for file in sorted(Path(path).glob("*"))]
    found = [name for name in names if name.startswith(("tokenizer", "vocab")) or name.endswith(".model")]
    if names and not found:
        return None  # for some models transformers would make an empty tokenizer
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=remote_code.is_allowed())
    except Exception as error:  # the tokenizers library raises Exception itself
        if not found and isinstance(error, OSError | ValueError | KeyError):
            return None
        files, reason = ", ".join(found), remote_code.reason(error)
        raise ValueError(f"the tokenizer of target {path!r} cannot be read ({files}): {reason}") from None


def auto_class(config: Any) -> Any:
    """Returns the class of transformers that loads a folder's own kind of model, one of text and images say."""
    if config.is_encoder_decoder:
        return AutoModelForSeq2SeqLM
    own = (config.architectures or [None])[0]
    multimodal = MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.get(config.model_type)
    if type(config) in MODEL_FOR_MULTIMODAL_LM_MAPPING and (
        own in ((multimodal,) if isinstance(multimodal, str) else multimodal or ())
        or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING
    ):
        return AutoModelForMultimodalLM
    return AutoModelForCausalLM


def media_token_ids(config: Any) -> dict[int, str]:
    """Returns the tokens that stand for images, sound or video in prompts, with their names in the configuration."""
    names = [f"{kind}_token_{what}" for kind in ("image", "video", "audio") for what in ("id", "index")]
    found = {name: getattr(config, name, None) for name in names}
    return {token: name for name, token in found.items() if isinstance(token, int)}


def decoder_start(config: Any, generation_config: Any) -> int | None:
    """Returns the first token of a decoder's output, None if neither config names one."""
    ids = (getattr(one, "decoder_start_token_id", None) for one in (generation_config, config))
    return next((int(token) for token in ids if token is not None), None)


def end_tokens(config: Any) -> tuple[int, ...]:
    """Returns the end-of-sequence ids of a generation config, empty if it has none; raises ValueError for others."""
    ids = getattr(config, "eos_token_id", None)
    found = ids if isinstance(ids, list | tuple) else () if ids is None else (ids,)
    if wrong := [token for token in found if type(token) is not int]:
        raise ValueError(f"eos_token_id holds {wrong[0]!r:.40}; it must be a token id or a list of token ids")
    return tuple(found)


def _generation_config(path: str) -> Any:
    try:
        found = GenerationConfig.from_pretrained(path)
        end_tokens(found)
    except Exception as error:
        if not (file := Path(path) / "generation_config.json").is_file():
            return None
        # transformers would do without it, and so without the tokens that end a text.
        raise ValueError(f"{file} cannot be read ({remote_code.reason(error)}); correct or download it again") from None
    return found


def context_length(config: Any) -> int:
    """Returns the longest sequence that a model's positions allow.

    Models with long or dynamic RoPE rotate all keys again once a text outgrows the original length, which no cache can
    follow: that length is their limit.
    """
    limit = int(getattr(config, "max_position_embeddings", None) or NO_LIMIT)
    rope = getattr(config, "rope_parameters", None) or {}
    by_kind_of_layer = [part for part in rope.values() if isinstance(part, dict)]
    for part in by_kind_of_layer or [rope]:
        original = part.get("original_max_position_embeddings") or getattr(
            config, "original_max_position_embeddings", None
        )
        if part.get("rope_type") in ("longrope", "dynamic") and original:
            limit = min(limit, int(original))
    return limit


def tokenizer_hash(tokenizer: Any) -> str | None:
    """Returns a hash of the tokenizer's vocabulary, None without a tokenizer."""
    if tokenizer is None:
        return None
    entries = sorted((token_id, token) for token, token_id in tokenizer.get_vocab().items())
    return hashlib.sha256(repr(entries).encode()).hexdigest()[:32]
