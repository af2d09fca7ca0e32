"""Provenance: how, and with what target, an artifact or a folder of data was made."""

import hashlib
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy
import safetensors
import torch
import transformers

from draftsmith.loading import remote_code


def run_provenance() -> dict[str, Any]:
    """Returns the command, the commit and the library versions of this process."""
    return {
        "command": shlex.join(sys.argv),
        "commit": _commit(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "numpy": numpy.__version__,
            "safetensors": safetensors.__version__,
        },
    }


def target_provenance(target: Any) -> dict[str, Any]:
    """Returns what can change about a target while its fingerprint stays: chat template, dtype, rotary settings.

    `trust_remote_code` is whether it could run code of its own.
    """
    return {
        "template_hash": template_hash(target.tokenizer),
        "dtype": str(target.dtype).removeprefix("torch."),
        "rotary": rotary(target.model.config),
        "trust_remote_code": remote_code.is_allowed(),
    }


def template_hash(tokenizer: Any) -> str | None:
    """Returns a hash of the tokenizer's chat templates, None if it has none."""
    template = getattr(tokenizer, "chat_template", None)
    return hashlib.sha256(repr(template).encode()).hexdigest()[:32] if template else None


def rotary(config: Any) -> dict[str, Any]:
    """Returns the `rope_parameters` of a model's configuration, empty if it has none."""
    text = config.get_text_config(decoder=True)
    return dict(getattr(text, "rope_parameters", None) or {})


def _commit() -> str | None:
    """Returns the commit of the git checkout that holds this file, None outside one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
