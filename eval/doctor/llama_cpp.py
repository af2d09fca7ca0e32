"""Texts and acceptance of an export in llama.cpp, which the package xllamacpp runs in an environment of its own."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from draftsmith.export.llama_cpp.launch import fields
from eval.doctor import llama_cpp_process
from eval.doctor.serving import Environment, ServingCounts, ask

ENVIRONMENT = Environment(
    packages=("xllamacpp",), folder=".venv-llamacpp", made_by="./launch.sh serving-test --engine llama.cpp"
)


def run(
    python: str,
    target: str | Path,
    prompts: Sequence[list[int]],
    num_new: int,
    folder: Path,
    launch: Any = None,
    *,
    num_threads: int = 1,
    is_exact: bool = True,
    is_timed: bool = False,
    batch_sizes: Sequence[int] = (),
) -> dict[str, Any]:
    """Returns llama.cpp's greedy answers and counters for a GGUF target, with an export's launch settings or without.

    `folder` is created for the request and the response; with `is_exact`, keys and values are kept in float32 and
    attention is computed as torch does, where llama.cpp's defaults are float16 and flash attention. With `is_timed`,
    the `wall_s` of an answer is the time after its first token; `batch_s` is the least time of forwards of
    `batch_sizes` tokens. Raises ValueError if llama.cpp fails.
    """
    request = {
        "fields": fields({"model": str(target)} | ((launch or {}).get("settings") or {})),
        "prompts": list(prompts),
        "num_new": num_new,
        # A cache that is nearly full accepts no drafts.
        "num_tokens": max(map(len, prompts)) + 2 * num_new + 64,
        "num_threads": num_threads,
        "is_timed": is_timed,
        "batch_sizes": list(batch_sizes),
        "is_exact": is_exact,
    }
    return ask("llama.cpp", python, llama_cpp_process, folder, request)


def counts_of(response: dict[str, Any]) -> ServingCounts:
    """Returns the texts and counts of a response."""
    counts = {"drafts": 0, "draft_tokens": 0, "accepted_tokens_per_pos": []} | response["counts"]
    return ServingCounts(
        texts=[answer["text"] for answer in response["answers"]],
        num_drafts=counts["drafts"],
        num_drafted=counts["draft_tokens"],
        accepted=counts["accepted_tokens_per_pos"],
    )
