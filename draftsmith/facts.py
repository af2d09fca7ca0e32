"""What a target is, read from its folder without its weights, so that bad input is refused before they load."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer

NO_LIMIT = 2**30
"""Context length of a model whose positions have no end."""


@dataclass(frozen=True, kw_only=True)
class TargetFacts:
    """A target's name, shape and tokenizer, under the names that `Target` gives them."""

    name: str
    tokenizer: Any
    vocab_size: int
    num_layers: int
    hidden_size: int
    context_length: int
    is_encoder_decoder: bool
    fingerprint: None = None
    """Only the weights tell."""

    @property
    def tokenizer_hash(self) -> str | None:
        """As `Target.tokenizer_hash`."""
        return tokenizer_hash(self.tokenizer)


def read_facts(path: str) -> TargetFacts:
    """Reads config and tokenizer of a transformers folder or hub name; `$DRAFTSMITH_OFFLINE=1` forbids the hub.

    Raises ValueError when there is no model.
    """
    if Path(path).is_dir() and not (Path(path) / "config.json").is_file():
        raise ValueError(f"target folder {path} has no config.json; name a transformers model folder")
    if not Path(path).is_dir() and os.environ.get("DRAFTSMITH_OFFLINE") == "1":
        raise ValueError(f"target {path!r} is no local folder, and DRAFTSMITH_OFFLINE=1 forbids asking the hub")
    try:
        whole = AutoConfig.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"target {path!r} cannot be read: {str(error).splitlines()[0]}") from None
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError):
        tokenizer = None
    config = whole.get_text_config(decoder=True)
    return TargetFacts(
        name=path,
        tokenizer=tokenizer,
        vocab_size=config.vocab_size,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        context_length=context_length(config),
        is_encoder_decoder=bool(whole.is_encoder_decoder),
    )


def context_length(config: Any) -> int:
    """Returns the longest sequence a model's positions allow.

    Long-RoPE models turn all keys anew once a text outgrows the original length, which no cache can follow; they end
    there.
    """
    limit = int(getattr(config, "max_position_embeddings", None) or NO_LIMIT)
    rope = getattr(config, "rope_parameters", None) or {}
    original = rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
    if rope.get("rope_type") == "longrope" and original:
        limit = min(limit, int(original))
    return limit


def tokenizer_hash(tokenizer: Any) -> str | None:
    """Returns a hash of the tokenizer's vocabulary, None without a tokenizer."""
    if tokenizer is None:
        return None
    entries = sorted((token_id, token) for token, token_id in tokenizer.get_vocab().items())
    return hashlib.sha256(repr(entries).encode()).hexdigest()[:32]
