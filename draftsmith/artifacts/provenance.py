"""What a target was like when an artifact was made with it, beyond its weights: what may change unnoticed later."""

import hashlib
from typing import Any

Facts = dict[str, Any]


def made_with(target: Any) -> Facts:
    """Returns what a manifest keeps of a target besides its fingerprint: template, dtype and rotary positions."""
    return {
        "template_hash": template_hash(target.tokenizer),
        "dtype": str(target.dtype).removeprefix("torch."),
        "rotary": rotary(target.model.config),
    }


def template_hash(tokenizer: Any) -> str | None:
    """Returns a hash of the tokenizer's chat templates, None without one."""
    template = getattr(tokenizer, "chat_template", None)
    return hashlib.sha256(repr(template).encode()).hexdigest()[:32] if template else None


def rotary(config: Any) -> Facts:
    """Returns what a model's configuration says of rotary positions, nothing if it has none."""
    text = config.get_text_config(decoder=True)
    return dict(getattr(text, "rope_parameters", None) or {})
