"""Acceptance of an exported drafter in an engine and in draftsmith's own loop, counted in the same way."""

import json
import os
import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import draftsmith
from draftsmith import Target
from draftsmith.export.launch import ARTIFACT_VARIABLE
from eval.doctor import vllm_process
from eval.report.recorded_texts import greedy_steps

TOLERANCE = 40
"""One accepted token in this many may differ: vLLM sums in another order than PyTorch, which can swap tokens of nearly
equal probability."""
TIMEOUT_S = 900


@dataclass(frozen=True, kw_only=True)
class ServingCounts:
    """Texts and acceptance counts over all prompts."""

    texts: list[list[int]]
    num_drafts: int
    num_drafted: int
    accepted: list[int]
    """Number of tokens accepted at each depth."""

    @property
    def per_draft(self) -> float:
        """Returns the mean number of accepted tokens per draft."""
        return sum(self.accepted) / max(self.num_drafts, 1)


@dataclass(frozen=True, kw_only=True)
class Environment:
    """The environment in which an engine runs."""

    packages: tuple[str, ...]
    folder: str
    made_by: str

    def check(self, python: str) -> None:
        """Raises ValueError unless `python` is an interpreter that has the packages."""
        code = f"from importlib.util import find_spec; print(all(map(find_spec, {self.packages!r})))"
        try:
            done = subprocess.run([python, "-P", "-c", code], capture_output=True, timeout=60)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise ValueError(f"{python} cannot be run as a Python interpreter: {error}") from None
        if done.stdout.split() != [b"True"]:
            raise ValueError(
                f"{python} lacks {' or '.join(self.packages)}; use {self.folder}/bin/python, made by {self.made_by}"
            )


VLLM = Environment(packages=("vllm", "draftsmith"), folder=".venv-serving", made_by="./launch.sh serving-test")


def ask(
    engine: str,
    python: str,
    process: ModuleType,
    folder: Path,
    request: dict[str, Any],
    variables: dict[str, str] | None = None,
) -> Any:
    """Returns the response of an engine, whose `process` module `python` runs on the request.

    `folder` is created for both; `variables` are the process's environment. Raises ValueError if the engine fails.
    """
    folder.mkdir()
    (folder / process.REQUEST).write_text(json.dumps(request))
    command = [python, "-P", str(process.__file__), str(folder)]
    try:
        done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise ValueError(f"{engine}, run by {python}, did not finish within {TIMEOUT_S} seconds") from None
    if done.returncode:
        raise ValueError(f"{engine}, run by {python}, failed: {(done.stdout + done.stderr)[-4000:]}")
    return json.loads((folder / process.RESPONSE).read_text())


def run_vllm(
    python: str, target: Target, prompts: Sequence[list[int]], num_new: int, folder: Path, launch: Any = None
) -> ServingCounts:
    """Decodes the prompts greedily in vLLM, with the launch settings of an export or without a drafter.

    `python` is an interpreter with vLLM; `folder` is created for the request and the response. Raises ValueError if
    vLLM fails.
    """
    settings = (launch or {}).get("settings")
    room = num_new + 2 * (settings or {}).get("num_speculative_tokens", 0) + 1
    request = {
        "target": target.name,
        "dtype": str(target.dtype).removeprefix("torch."),
        "prompts": list(prompts),
        "num_new": num_new,
        "max_tokens": max(map(len, prompts)) + room,
        "settings": settings,
    }
    variables = dict(os.environ)
    for word in shlex.split(launch["command"]) if launch else []:
        name, _, value = word.partition("=")
        if name == ARTIFACT_VARIABLE:
            variables[name] = value
    response = ask("vLLM", python, vllm_process, folder, request, variables)
    counts = {"num_drafts": 0, "num_draft_tokens": 0, "num_accepted_tokens_per_pos": []} | response["counts"]
    return ServingCounts(
        texts=response["texts"],
        num_drafts=int(counts["num_drafts"]),
        num_drafted=int(counts["num_draft_tokens"]),
        accepted=[int(number) for number in counts["num_accepted_tokens_per_pos"]],
    )


class StepSizes:
    """A streamer that records the number of tokens of each step."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def put(self, tokens: Tensor) -> None:
        self.sizes.append(len(tokens))

    def end(self) -> None:
        """Does nothing."""


def run_draftsmith(
    drafter: Any, prompts: Sequence[list[int]], num_new: int, num_draft: int, *, cuts_last: bool = False
) -> ServingCounts:
    """Decodes the prompts with draftsmith's loop and drafts of `num_draft` tokens, counting as engines do.

    They start drafting after the first new token. vLLM ignores end-of-sequence tokens here and counts all tokens of the
    draft that reaches the maximum length. llama.cpp (`cuts_last`) ends texts and cuts that draft to one token less than
    are wanted.
    """
    ends = drafter.target.eos_token_ids if cuts_last else ()
    new, sizes, num_drafted = [], [], 0
    for prompt in prompts:
        first = draftsmith.generate(drafter.target, torch.tensor([prompt]), max_new_tokens=1, eos_token_id=[])
        streamer = StepSizes()
        drafter.forget()
        out = draftsmith.generate(
            drafter.target,
            first.sequences,
            drafter,
            max_new_tokens=num_new + 2 * num_draft,
            eos_token_id=[],
            length=f"fixed={num_draft}",
            streamer=streamer,
        )
        text = out.sequences[0, len(prompt) : len(prompt) + num_new].tolist()
        length = next((at for at, token in enumerate(text) if token in ends), num_new)
        new.append(text[: length + 1])
        num_done = 1
        for size in streamer.sizes[1:]:
            room = num_new - num_done if cuts_last else num_draft + 1
            if num_done < num_new and num_done <= length and room > 1:
                sizes.append(min(size, room))
                num_drafted += min(num_draft, room - 1)
            num_done += size
    return ServingCounts(
        texts=new,
        num_drafts=len(sizes),
        num_drafted=num_drafted,
        accepted=[sum(size > depth + 1 for size in sizes) for depth in range(num_draft)],
    )


def agrees(found: ServingCounts, expected: ServingCounts) -> bool:
    """Returns True if the accepted counts at each depth agree up to rounding."""
    if len(found.accepted) != len(expected.accepted):
        return False
    pairs = zip(found.accepted, expected.accepted, strict=True)
    max_difference = 1 + sum(expected.accepted) // TOLERANCE
    return (
        all(abs(one - other) <= max_difference for one, other in pairs)
        and abs(found.num_drafts - expected.num_drafts) <= max_difference
    )


def drafts_trees(drafter: Any, prompt: list[int], num_new: int, num_draft: int) -> bool:
    """Returns True if any draft has several tokens for one position, which vLLM does not verify."""
    steps = greedy_steps(drafter, prompt, num_new, length=f"fixed={num_draft}")
    return any(any(path) for step in steps for path in step.drafted)
