"""What a target is, read from its folder without its weights, so that bad input is refused before they load."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class TargetFacts:
    """A target's name, shape and tokenizer, under the names that `draftsmith.Target` gives them."""

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
        return None if self.tokenizer is None else tokenizer_hash(self.tokenizer)


def read_facts(path: str) -> TargetFacts:
    """Reads config and tokenizer of a transformers folder or hub name; raises ValueError when there is no config."""
    if not Path(path).is_dir() and os.environ.get("DRAFTSMITH_OFFLINE") == "1":
        raise ValueError(f"target {path!r} is no local folder, and $DRAFTSMITH_OFFLINE=1 forbids to ask the hub")
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
        context_length=getattr(config, "max_position_embeddings", None) or 2**30,
        is_encoder_decoder=bool(whole.is_encoder_decoder),
    )


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns what `Target.tokenizer_hash` is with this tokenizer."""
    entries = sorted((token_id, token) for token, token_id in tokenizer.get_vocab().items())
    return hashlib.sha256(repr(entries).encode()).hexdigest()[:32]
