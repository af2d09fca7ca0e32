"""Builds a datastore (REST, 2311.08252): documents, a suffix array of each shard of them, and nothing learnt."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data.batches import Batch, Example
from draftsmith import Target
from draftsmith.drafters.rest import Config, Drafter
from trainers import Metrics, Needs, corpus
from trainers.run import RunSettings
from trainers.suffix_arrays import check_store, stored


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What goes into the store, and how it is drafted from; `--max-steps` and the optimiser's settings mean nothing."""

    budget_mb: float = 0.0
    """Megabytes that the store may take: the most useful documents are kept; 0 for any."""
    context: int = 16
    """Tokens of a prompt that are stored before what is learnt, so that its beginning is found too."""
    shard_tokens: int = 50_000_000
    """Most tokens of a file, which are sorted at once."""
    max_match: int = 16
    """Most last tokens looked for."""
    min_match: int = 2
    """Fewest that may match."""
    max_matches: int = 64
    """Most places whose continuation is read, evenly spread over those found."""
    num_draft: int = 10
    """Most tokens of each continuation."""
    num_nodes: int = 16
    """Most tokens drafted: the likeliest beginnings of the continuations."""
    min_chance: float = 0.05
    """Least chance of being right that a token drafted may have, as far as its frequency tells."""

    def __post_init__(self) -> None:
        _config(self)
        check_store(self)


def needs(settings: Settings, target: Target) -> Needs:
    return Needs()


def fit(settings: Settings, target: Target, rows: Sequence[Example], run: RunSettings, output: Path) -> Drafter:
    """Returns the drafter of a store of the rows' text, its shards kept in `output` until the run is finished."""
    shards = stored(settings, rows, target.vocab_size, run, output)
    return Drafter(_config(settings), target, shards)


def judge(drafter: Drafter, batch: Batch, settings: Settings, target: Target) -> Metrics:
    return corpus.judge(drafter, batch, target)


def _config(settings: Settings) -> Config:
    return Config(
        max_match=settings.max_match,
        min_match=settings.min_match,
        max_matches=settings.max_matches,
        num_draft=settings.num_draft,
        num_nodes=settings.num_nodes,
        min_chance=settings.min_chance,
    )
