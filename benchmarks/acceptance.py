"""Mean accepted length (tau) of each verifier with the same prompts and draft model, and the optimal acceptance rate.

    ./launch.sh quickstart                                    # once: trains the draft model
    .venv/bin/python benchmarks/acceptance.py                 # pocket target, temperature 1, 200 prompts

Pocket target, the quickstart's draft model: token 1.54, block 1.59; recursive 1.77, traversal 1.81; on three paths
recursive 1.73, K-SEQ 1.76, traversal 1.79, multi-path 1.84; standard errors 0.02 to 0.03 (the full table is in LOG.md).
"""

import dataclasses
import math
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import draftsmith
from data import POCKET
from data.prompts import load_prompts
from draftsmith import Target
from draftsmith.artifacts.artifact import read_manifest
from draftsmith.core.sampling import Sampling
from draftsmith.length.costs import num_threads
from eval import hardware
from eval.bakeoff.optimal_transport import FirstTokenRecorder
from trainers.training.settings import parse_settings

TREE = ((0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0))
PATHS = ((0,), (1,), (2,), (0, 0), (1, 0), (2, 0), (0, 0, 0), (1, 0, 0), (2, 0, 0))
CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("chain of 3", "token", {}),
    ("chain of 3", "block", {}),
    ("chain of 3", "coupled", {}),
    ("tree of 7, without replacement", "recursive", {"tree": TREE}),
    ("tree of 7, without replacement", "traversal", {"tree": TREE}),
    ("tree of 7, without replacement", "coupled", {"tree": TREE}),
    ("tree of 7, top tokens and a sample", "greedy_drafting", {"tree": TREE, "siblings": "top_and_drawn"}),
    ("3 paths of 3, independent", "recursive", {"tree": PATHS, "siblings": "independent"}),
    ("3 paths of 3, independent", "kseq", {"tree": PATHS, "siblings": "independent"}),
    ("3 paths of 3, independent", "traversal", {"tree": PATHS, "siblings": "independent"}),
    ("3 paths of 3, independent", "multipath", {"tree": PATHS, "siblings": "independent"}),
]


@dataclass(frozen=True, kw_only=True)
class BenchmarkSettings:
    """The target, draft model, prompts and sampling."""

    target: str = str(POCKET)
    """A transformers folder or hub name."""
    draft: str = "runs/quickstart/distill"
    """Artifact of a draft model that drafts chains."""
    data: str = "python-source"
    """Source of the prompts."""
    num_prompts: int = 200
    """Number of prompts."""
    max_new_tokens: int = 64
    """New tokens per prompt."""
    temperature: float = 1.0
    """Sampling temperature, above 0."""
    batch_size: int = 20
    """Prompts per batch."""
    threads: int = 1
    """CPU threads; 0 keeps torch's default."""


def main(run: BenchmarkSettings) -> None:
    read_manifest(run.draft)
    target = Target.from_pretrained(run.target, dtype="float32")
    given: Any = draftsmith.load(run.draft, target)
    if not {"num_draft", "length"} <= vars(given.config).keys():
        raise ValueError(
            f"{run.draft} drafts no chains; pass the artifact of a draft model, such as distill, lstm or ngram"
        )
    # Drafters other than draft LMs sample chains only.
    cases = [case for case in CASES if not case[2] or hasattr(given.config, "siblings")]
    chains = {name: empty for name, empty in (("width", 0), ("tree", ())) if hasattr(given.config, name)}
    sampling = Sampling(temperature=run.temperature)
    prompts = [prompt.ids for prompt in load_prompts(run.data, target.tokenizer, max_prompts=run.num_prompts)]
    batches = [prompts[begin : begin + run.batch_size] for begin in range(0, len(prompts), run.batch_size)]
    print(f"{hardware.describe(target.device)}; {len(prompts)} prompts, {run.max_new_tokens} new tokens, temperature "
          f"{run.temperature:g}; commit {hardware.commit()}")  # fmt: skip
    print(f"{'draft':35} {'verifier':16} tau                first-token acceptance rate, optimum")
    with num_threads(run.threads), tqdm(total=len(cases) * len(batches), unit="batch", leave=False) as bar:
        for shape, verifier, changes in cases:
            given.config = dataclasses.replace(given.config, num_draft=3, length="fixed", **chains | changes)
            watched, taus = FirstTokenRecorder(given, sampling), []
            for number, rows in enumerate(batches):
                ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
                mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(row)) for row in rows], batch_first=True)
                out = draftsmith.generate(
                    target,
                    ids,
                    watched,
                    attention_mask=mask,
                    max_new_tokens=run.max_new_tokens,
                    temperature=run.temperature,
                    seed=number,
                    verifier=verifier,
                )
                taus.append(out.stats.tau)
                bar.update()
            spread = statistics.stdev(taus) / math.sqrt(len(taus)) if len(taus) > 1 else math.nan
            first_token = ""
            if watched.num_steps:
                first_token = (
                    f"{watched.num_accepted / watched.num_steps:.3f}, {watched.sum_of_bounds / watched.num_steps:.3f}"
                )
            tqdm.write(f"{shape:35} {verifier:16} {statistics.mean(taus):.3f} +- {spread:.3f}     {first_token}")


if __name__ == "__main__":
    try:
        main(*parse_settings(BenchmarkSettings, description=__doc__))
    except ValueError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
