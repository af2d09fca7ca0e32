"""Stores text for SuffixDecoding (2411.04975): documents, a suffix array of each shard of them, and nothing learnt."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data.batches import Batch, Example
from draftsmith import Target
from draftsmith.drafters.suffix import Config, Drafter
from trainers import Metrics, Needs, corpus
from trainers.run import RunSettings
from trainers.suffix_arrays import check_store, stored


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What goes into the store, and how it is drafted from; `--max-steps` and the optimiser's settings mean nothing."""

    budget_mb: float = 0.0
    """Megabytes that the store may take: the most useful documents are kept; 0 for any."""
    context: int = 24
    """Tokens of a prompt that are stored before what is learnt, so that its beginning is found too."""
    shard_tokens: int = 50_000_000
    """Most tokens of a file, which are sorted at once."""
    max_match: int = 24
    """Most last tokens looked for."""
    factor: float = 1.0
    """Tokens drafted for each token of the match."""
    offset: float = 0.0
    """Tokens drafted beside those."""
    num_draft: int = 16
    """Most tokens drafted."""
    branches: bool = True
    """Whether the likeliest tokens are drafted as a tree, or those of the likeliest path."""
    min_chance: float = 0.1
    """Tokens whose path followed a smaller share of the matches are not drafted."""
    max_matches: int = 64
    """Most places whose continuation is read, evenly spread over those that match."""
    recent_tokens: int = 65_536
    """Tokens of finished calls that are kept for later ones, the oldest dropped first; 0 for none."""

    def __post_init__(self) -> None:
        _config(self)
        check_store(self)


def needs(settings: Settings, target: Target) -> Needs:
    return Needs()


def fit(settings: Settings, target: Target, rows: Sequence[Example], run: RunSettings, output: Path) -> Drafter:
    """Returns the drafter of a store of the rows' text, its shards kept in `output` until the run is finished."""
    return Drafter(_config(settings), target, stored(settings, rows, target.vocab_size, run, output))


def judge(drafter: Drafter, batch: Batch, settings: Settings, target: Target) -> Metrics:
    """Returns the tokens accepted a round in decoding; what is learnt in doing so is forgotten again."""
    return corpus.judge(Drafter(drafter.config, target, drafter.shards), batch, target)


def _config(settings: Settings) -> Config:
    names = [field.name for field in dataclasses.fields(Config)]
    return Config(**{name: getattr(settings, name) for name in names})
