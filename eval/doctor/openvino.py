"""Texts and acceptance of an export in OpenVINO GenAI, which runs in an environment of its own."""

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from draftsmith.export.openvino import EXACT
from eval.doctor import openvino_process
from eval.doctor.serving import TIMEOUT_S, Environment, ServingCounts, ask

ENVIRONMENT = Environment(
    packages=("openvino_genai", "optimum.intel"),
    folder=".venv-openvino",
    made_by="./launch.sh serving-test --engine openvino",
)
CONVERSION_FAILED = "optimum-intel, run beside {}, failed: {}"


def convert(python: str, launch: dict[str, Any]) -> None:
    """Runs the commands that convert an export, with the programs beside `python`; raises ValueError if one fails."""
    programs = str(Path(python).absolute().parent)
    # Paths with which this process finds modules are of no use to another environment.
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    variables |= {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}
    try:
        done = subprocess.run(
            ["bash", "-ec", launch["convert"]], env=variables, capture_output=True, text=True, timeout=TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        raise ValueError(CONVERSION_FAILED.format(python, f"it ran for more than {TIMEOUT_S} seconds")) from None
    if done.returncode:
        raise ValueError(CONVERSION_FAILED.format(python, (done.stdout + done.stderr)[-4000:]))


def run(
    python: str,
    target: str | Path,
    prompts: Sequence[list[int]],
    num_new: int,
    folder: Path,
    settings: dict[str, Any] | None = None,
    *,
    num_threads: int = 1,
    is_exact: bool = True,
    is_timed: bool = False,
) -> list[dict[str, Any]]:
    """Returns OpenVINO's greedy answers for a converted target, with an export's launch settings or without.

    `folder` is created for the request and the response; with `is_exact`, OpenVINO computes in float32 and keeps keys
    and values in it. With `is_timed`, no answer ends early, and `cpu_s` and `wall_s` are the times after its first
    token. Raises ValueError if OpenVINO fails.
    """
    request = {
        "target": str(target),
        "settings": settings or {},
        "properties": EXACT if is_exact else {},
        "prompts": list(prompts),
        "num_new": num_new,
        "num_threads": num_threads,
        "is_timed": is_timed,
    }
    return ask("OpenVINO GenAI", python, openvino_process, folder, request)["answers"]


def counts_of(answers: Sequence[dict[str, Any]], num_new: int, num_draft: int) -> ServingCounts:
    """Returns texts and counts of answers of up to `num_new` tokens with drafts of depth `num_draft`.

    The steps after the first, which decodes plainly, are those of drafts. A step that has one token left to decode
    drafts nothing.
    """
    sizes = []
    for answer in answers:
        num_done = 1
        for size in answer["sizes"][1:]:
            if num_done + 1 < num_new:
                sizes.append(size)
            num_done += size
    return ServingCounts(
        texts=[answer["text"] for answer in answers],
        num_drafts=len(sizes),
        num_drafted=sum(answer["num_drafted"] or 0 for answer in answers),
        accepted=[sum(size > depth + 1 for size in sizes) for depth in range(num_draft)],
    )
