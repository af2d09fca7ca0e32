"""Stores text for SuffixDecoding (2411.04975): documents, a suffix array of each shard of them, and nothing learnt."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data.batches import Batch, Example
from draftsmith import Target
from draftsmith.drafters.suffix import Config, Drafter
from trainers import Metrics, Needs
from trainers.corpora import corpus
from trainers.corpora.suffix_arrays import StoreSettings, build_shards
from trainers.training.run_settings import RunSettings
from trainers.training.settings import part_of


@dataclass(frozen=True, kw_only=True)
class Settings(StoreSettings, Config):
    """A store of text, and how it is drafted from."""

    def __post_init__(self) -> None:
        StoreSettings.__post_init__(self)
        Config.__post_init__(self)


def needs(settings: Settings, target: Target) -> Needs:
    return Needs()


def fit(settings: Settings, target: Target, rows: Sequence[Example], run: RunSettings, output: Path) -> Drafter:
    """Returns the drafter of a store of the rows' text, its shards kept in `output` until the run is finished."""
    return Drafter(part_of(Config, settings), target, build_shards(settings, rows, target.vocab_size, run, output))


def evaluate(drafter: Drafter, batch: Batch, settings: Settings, target: Target) -> Metrics:
    """Returns the tokens accepted a round in decoding; what is learnt in doing so is forgotten again."""
    return corpus.evaluate(Drafter(drafter.config, target, drafter.shards), batch, target)
