"""Medusa heads against plain decoding in the same loop.

    ./launch.sh quickstart                       # once: trains the heads
    .venv/bin/python benchmarks/medusa.py        # pocket target; any artifact with --draft

Both decode the same prompts in turn, in one process; ratios are of tok/s within a round.
One core of an AMD EPYC, heads of the command in recipes/medusa.py, each with the tree computed for its dtype, in two
quiet runs: 1.08 and 1.04 in float32, output identical; 1.39 and 1.40 in bfloat16. On the former prompts, one of which
the target had memorised, 1.11 to 1.14 and 1.45 to 1.51. In bfloat16 near ties may be resolved differently in wider
forwards, so that output is not always identical.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import draftsmith
from data import POCKET
from data.prompts import load_prompts
from draftsmith import Target
from draftsmith.artifacts.artifact import read_manifest
from eval.bakeoff.measure import DecodingMethod, draftsmith_method
from eval.bakeoff.pairwise import PairSettings, compare_pair, describe_conditions
from trainers.training.settings import parse_settings


@dataclass(frozen=True, kw_only=True)
class BenchmarkSettings:
    """The target, drafter and prompts."""

    target: str = str(POCKET)
    """A transformers folder or hub name."""
    draft: str = "runs/quickstart/medusa"
    """The drafter's artifact."""
    data: str = "python-source"
    """Source of the prompts."""
    num_prompts: int = 8
    """Prompts decoded in every round."""
    dtype: str = "float32"
    """Dtype of the target's weights."""


def main(run: BenchmarkSettings, settings: PairSettings) -> None:
    read_manifest(run.draft)
    target = Target.from_pretrained(run.target, dtype=run.dtype)
    prompts = load_prompts(run.data, target.tokenizer, max_prompts=run.num_prompts)
    drafter = draftsmith.load(run.draft, target)
    print(describe_conditions(target, len(prompts), settings))
    ours = DecodingMethod(name=Path(run.draft).name, decode=draftsmith_method(target, drafter), drafter=drafter)
    print(
        "speed-up:",
        compare_pair(ours, DecodingMethod(name="plain", decode=draftsmith_method(target)), target, prompts, settings),
    )


if __name__ == "__main__":
    try:
        main(*parse_settings(BenchmarkSettings, PairSettings, description=__doc__))
    except ValueError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
