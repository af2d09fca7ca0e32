"""What vLLM accepts of an exported drafter, and what draftsmith's own loop does, counted alike."""

import json
import os
import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import draftsmith
from draftsmith import Target
from draftsmith.export.launch import ARTIFACT_VARIABLE
from eval.doctor import vllm_process
from eval.report.recorded_texts import greedy_steps

TOLERANCE = 40
"""vLLM sums in another order than PyTorch, so that now and then two tokens that are all but equally likely change
places: one accepted token in so many may differ."""
TIMEOUT_S = 900
HAS_BOTH = "from importlib.util import find_spec; raise SystemExit(not (find_spec('vllm') and find_spec('draftsmith')))"


@dataclass(frozen=True, kw_only=True)
class ServingCounts:
    """What came of all prompts."""

    texts: list[list[int]]
    num_drafts: int
    num_drafted: int
    accepted: list[int]
    """At each place of a draft, how many were."""

    @property
    def per_draft(self) -> float:
        return sum(self.accepted) / max(self.num_drafts, 1)


def check_python(python: str) -> None:
    """Raises ValueError unless this is a Python that has vLLM and draftsmith."""
    try:
        done = subprocess.run([python, "-P", "-c", HAS_BOTH], capture_output=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ValueError(f"{python} is no Python that runs: {error}") from None
    if done.returncode:
        raise ValueError(f"{python} lacks vLLM or draftsmith; ./launch.sh serving-test makes .venv-serving/bin/python")


def run_vllm(
    python: str, target: Target, prompts: Sequence[list[int]], num_new: int, folder: Path, launch: Any = None
) -> ServingCounts:
    """Returns what vLLM makes of the prompts, greedily, launched as an export says, or without a drafter.

    `python` is one that has vLLM, `folder` is new and holds what is asked and answered. Raises ValueError if
    vLLM fails.
    """
    folder.mkdir()
    settings = (launch or {}).get("settings")
    room = num_new + 2 * (settings or {}).get("num_speculative_tokens", 0) + 1
    asked = {
        "target": target.name,
        "dtype": str(target.dtype).removeprefix("torch."),
        "prompts": list(prompts),
        "num_new": num_new,
        "max_tokens": max(map(len, prompts)) + room,
        "settings": settings,
    }
    (folder / vllm_process.ASKED).write_text(json.dumps(asked))
    variables = dict(os.environ)
    for word in shlex.split(launch["command"]) if launch else []:
        name, _, value = word.partition("=")
        if name == ARTIFACT_VARIABLE:
            variables[name] = value
    command = [python, "-P", str(Path(vllm_process.__file__)), str(folder)]
    try:
        done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise ValueError(f"vLLM, run by {python}, did not end in {TIMEOUT_S} seconds") from None
    if done.returncode:
        raise ValueError(f"vLLM, run by {python}, failed: {(done.stdout + done.stderr)[-4000:]}")
    answer = json.loads((folder / vllm_process.ANSWER).read_text())
    counts = {"num_drafts": 0, "num_draft_tokens": 0, "num_accepted_tokens_per_pos": []} | answer["counts"]
    return ServingCounts(
        texts=answer["texts"],
        num_drafts=int(counts["num_drafts"]),
        num_drafted=int(counts["num_draft_tokens"]),
        accepted=[int(number) for number in counts["num_accepted_tokens_per_pos"]],
    )


class StepSizes:
    """A streamer that notes how many tokens each step gives."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def put(self, tokens: Tensor) -> None:
        self.sizes.append(len(tokens))

    def end(self) -> None:
        """Nothing is held back."""


def run_draftsmith(drafter: Any, prompts: Sequence[list[int]], num_new: int, num_draft: int) -> ServingCounts:
    """Returns what draftsmith's loop makes of the prompts with drafts of `num_draft` tokens, counted as vLLM counts.

    vLLM drafts once the first token is there, counts whole the draft with which a text reaches its length, and is told
    here to go on after the end of a sequence.
    """
    new, sizes = [], []
    for prompt in prompts:
        first = draftsmith.generate(drafter.target, torch.tensor([prompt]), max_new_tokens=1, eos_token_id=[])
        watch = StepSizes()
        drafter.forget()
        out = draftsmith.generate(
            drafter.target,
            first.sequences,
            drafter,
            max_new_tokens=num_new + 2 * num_draft,
            eos_token_id=[],
            length=f"fixed={num_draft}",
            streamer=watch,
        )
        new.append(out.sequences[0, len(prompt) : len(prompt) + num_new].tolist())
        num_done = 1
        for size in watch.sizes[1:]:
            if num_done < num_new:
                sizes.append(size)
            num_done += size
    return ServingCounts(
        texts=new,
        num_drafts=len(sizes),
        num_drafted=len(sizes) * num_draft,
        accepted=[sum(size > place + 1 for size in sizes) for place in range(num_draft)],
    )


def agrees(found: ServingCounts, expected: ServingCounts) -> bool:
    """Returns whether as much was accepted at each place, but for rounding."""
    if len(found.accepted) != len(expected.accepted):
        return False
    pairs = zip(found.accepted, expected.accepted, strict=True)
    most = 1 + sum(expected.accepted) // TOLERANCE
    return all(abs(one - other) <= most for one, other in pairs) and abs(found.num_drafts - expected.num_drafts) <= most


def drafts_trees(drafter: Any, prompt: list[int], num_new: int, num_draft: int) -> bool:
    """Returns whether more than one token is ever drafted for the same place, which vLLM does not verify."""
    steps = greedy_steps(drafter, prompt, num_new, length=f"fixed={num_draft}")
    return any(any(path) for step in steps for path in step.drafted)
