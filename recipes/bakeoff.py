"""Compares drafters with plain decoding and with transformers' own `generate`: one table and a picture.

    ./launch.sh bakeoff --drafts runs/medusa runs/distill           # pocket target, held-out source, into runs/bakeoff
    ./launch.sh bakeoff --target T --data prompts.jsonl --drafts runs/mine --num-prompts 64 --max-new-tokens 256
    ./launch.sh bakeoff --drafts runs/medusa --temperatures 0,0.7 --batch-sizes 1,4,16 --verifiers typical
    ./launch.sh bakeoff --drafts runs/distill --lengths fixed=4,heuristic,expected_gain --gates 0.5

Every round decodes the same prompts by each contender in turn; speed-ups are medians over rounds. A run that was killed
is continued by the same command. Pocket target, two drafters, one CPU core: about 5 minutes.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from data import POCKET
from data.prompts import load_prompts
from draftsmith import Target
from draftsmith.artifact import check_fits, read_manifest
from draftsmith.facts import read_facts
from eval.compare import compare
from eval.results import check_output
from eval.settings import Settings
from eval.table import header, table
from trainers.settings import parse_settings


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """What is compared, on what, and how long."""

    target: str = str(POCKET)
    """A transformers folder or hub name."""
    drafts: tuple[str, ...] = ()
    """Folders of the artifacts to compare."""
    data: str = "python-source"
    """Where the prompts come from; see data/sources.py."""
    output: str = "runs/bakeoff"
    """Folder for bakeoff.json, .md, .csv and .png."""
    num_prompts: int = 16
    """Prompts drawn from the data, 0 for all."""
    max_steps: int = 0
    """At most so many of the largest batches, 0 for all prompts: for a quick trial."""
    prompt_tokens: int = 64
    """Length of prompts cut from source code or plain text."""
    long_prompts: Literal["refuse", "drop", "cut"] = "refuse"
    """What becomes of rows too long for the target's context."""
    max_new_tokens: int = 64
    """Tokens decoded after each prompt."""
    rounds: int = 3
    """Times that everything is decoded."""
    temperatures: str = "0,1"
    """With commas; 0 is greedy."""
    batch_sizes: str = "1,8"
    """With commas."""
    verifiers: str = ""
    """With commas: a further row for each drafter with this verifier, as typical, which is lossy."""
    lengths: str = ""
    """With commas: a further row for each drafter with this policy of draftsmith/length.py, as fixed=4 or heuristic."""
    forecast_sizes: str = "1,2,4,8,16"
    """With commas: batch sizes for which speed-ups are predicted beside those measured; empty for no predictions."""
    gates: str = ""
    """With commas: a further row for each drafter that drafts nothing where the target is less sure, as 0.5."""
    seed: int = 0
    """Of the choice of prompts and of what is sampled."""
    threads: int = 1
    """CPU threads, 0 for torch's own choice; a small target is fastest and steadiest on one."""
    device: str = "auto"
    """Where the target runs."""
    dtype: str = ""
    """What its weights are loaded as; if empty float32 on a CPU, and on a GPU as they are stored."""

    def comparison(self) -> Settings:
        """Returns what `compare` wants; raises ValueError for what it cannot be."""
        return Settings(
            temperatures=tuple(_numbers("temperatures", self.temperatures, float)),
            batch_sizes=tuple(_numbers("batch_sizes", self.batch_sizes, int)),
            verifiers=tuple(filter(None, self.verifiers.split(","))),
            lengths=tuple(filter(None, self.lengths.split(","))),
            forecast_sizes=tuple(_numbers("forecast_sizes", self.forecast_sizes, int)) if self.forecast_sizes else (),
            gates=tuple(_numbers("gates", self.gates, float)) if self.gates else (),
            rounds=self.rounds,
            max_new_tokens=self.max_new_tokens,
            seed=self.seed,
            threads=self.threads,
        )


def main(run: RunSettings) -> None:
    settings = run.comparison()
    check_output(Path(run.output))
    manifests = [read_manifest(draft) for draft in run.drafts]
    facts = read_facts(run.target)
    for draft, manifest in zip(run.drafts, manifests, strict=True):
        check_fits(draft, manifest, facts)
    num_prompts = run.num_prompts
    if run.max_steps:
        num_prompts = min(num_prompts or sys.maxsize, run.max_steps * max(settings.batch_sizes))
    prompts = load_prompts(
        run.data,
        facts.tokenizer,
        max_prompts=num_prompts,
        max_prompt_tokens=facts.context_length - run.max_new_tokens,
        prompt_tokens=run.prompt_tokens,
        long_prompts=run.long_prompts,
        seed=run.seed,
    )
    settings.check_prompts(len(prompts))
    dtype = run.dtype or ("auto" if torch.cuda.is_available() and run.device != "cpu" else "float32")
    target = Target.from_pretrained(run.target, dtype=dtype, device=run.device)
    rows = compare(target, prompts, [Path(draft) for draft in run.drafts], Path(run.output), settings)
    print("\n".join([header(rows, "terminal"), *table(rows, "terminal")]))
    print(f"\nWritten to {run.output}: bakeoff.md, .csv, .json and the picture {Path(run.output) / 'bakeoff.png'}")


def _numbers(name: str, text: str, kind: type) -> list:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{name} is {text!r}; expected numbers with commas, as in 0,1") from None


if __name__ == "__main__":
    try:
        main(*parse_settings(RunSettings, description=__doc__))
    except ValueError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
