"""How an export is launched: the exact command, what it was checked with, and where the drafter came from."""

import json
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from draftsmith.export.given import Given

LAUNCH = "launch.json"
NAMES = {"transformers": "transformers", "vllm": "vLLM", "sglang": "SGLang", "speculators": "speculators"}
"""The engines, and what they call themselves."""
CHECKED_WITH = {
    "transformers": "transformers 5.23.0",
    "vllm": "vLLM 0.32.0 on a CPU (./launch.sh serving-test); the code of 0.33.0 was read and not run",
    "sglang": "SGLang 0.5.23, whose code was read and not run",
    "speculators": "speculators 0.9.0",
}
MISLEADING = re.compile("eagle[-3]|dflash|dspark", re.IGNORECASE)
"""Parts of a path by which vLLM takes a draft model for something else, whatever method it was told."""
PROPOSER = "draftsmith.serving.vllm.Proposer"
"""The class by which vLLM runs drafters that go by tokens alone."""
ARTIFACT_VARIABLE = "DRAFTSMITH_ARTIFACT"
"""Environment variable that tells that class which artifact it runs."""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """How one export is launched."""

    command: str
    """What to run, every path whole."""
    target: str
    """The model that is served."""
    settings: dict[str, Any] = field(default_factory=dict)
    """The engine's own settings of speculation, as the command has them."""
    checked_with: str = ""
    """Versions, if others than all exports for the engine."""
    notes: tuple[str, ...] = ()
    """What differs from the drafter as draftsmith runs it."""


def write_launch(folder: Path, given: Given, engine: str, launch: Launch) -> None:
    """Writes launch.json: the command and settings, the versions they were checked with, the artifact's manifest."""
    record = {
        "engine": engine,
        "command": launch.command,
        "settings": launch.settings,
        "checked_with": launch.checked_with or CHECKED_WITH[engine],
        "notes": list(launch.notes),
        "target": launch.target,
        "artifact": given.manifest,
    }
    (folder / LAUNCH).write_text(json.dumps(record, indent=1) + "\n")


def read_launch(folder: Path) -> dict[str, Any]:
    """Returns what launch.json of an export says."""
    return json.loads((folder / LAUNCH).read_text())


def in_python(
    given: Given, *lines: str, target: str | None = None, notes: tuple[str, ...] = (), **settings: Any
) -> Launch:
    """Returns how `model.generate` of transformers is called; `lines` come after what loads `target` as `model`."""
    target = target or given.served
    auto = "AutoModelForSeq2SeqLM" if given.facts.is_encoder_decoder else "AutoModelForCausalLM"
    first = [
        f"from transformers import {auto}, AutoTokenizer, GenerationConfig",
        f"tokenizer = AutoTokenizer.from_pretrained({given.target_name!r})",
        f"model = {auto}.from_pretrained({target!r})",
        'inputs = tokenizer("some text", return_tensors="pt")',
    ]
    return Launch(command="\n".join([*first, *lines]), target=target, settings=settings, notes=notes)


def for_vllm(
    given: Given,
    settings: dict[str, Any],
    *,
    checked_with: str = "",
    notes: tuple[str, ...] = (),
    environment: dict[str, str] | None = None,
) -> Launch:
    """Returns how vLLM is launched with such a `--speculative-config`."""
    before = "".join(f"{name}={shlex.quote(value)} " for name, value in (environment or {}).items())
    told = shlex.quote(json.dumps(settings))
    command = f"{before}vllm serve {shlex.quote(given.served)} --speculative-config {told}"
    limits = ("min_p and logit_bias do not work while vLLM drafts.",)
    told_all = (*notes, *limits)
    return Launch(command=command, target=given.served, settings=settings, checked_with=checked_with, notes=told_all)


def for_sglang(given: Given, settings: dict[str, Any], *, notes: tuple[str, ...] = ()) -> Launch:
    """Returns how SGLang is launched with such flags, by their names without `--speculative-`."""
    flags = " ".join(f"--speculative-{name} {shlex.quote(str(value))}" for name, value in settings.items())
    command = f"python -m sglang.launch_server --model-path {shlex.quote(given.served)} {flags}"
    return Launch(command=command, target=given.served, settings=settings, notes=notes)


def check_path(given: Given) -> None:
    """Raises ValueError for an output whose path would make vLLM take a draft model for something else."""
    found = MISLEADING.search(str(given.output))
    if found:
        raise ValueError(
            f"{given.output} has {found[0]!r} in its path, by which vLLM takes any model for a drafter of that kind;"
            " name another folder"
        )
