"""Builds the datastore of SuffixDecoding, 2411.04975: suffix arrays of documents, without training."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data.batches import Batch, Example
from draftsmith import Target
from draftsmith.drafters.suffix import Config, Drafter
from trainers import Metrics
from trainers.corpora import evaluation
from trainers.corpora.suffix_arrays import DatastoreSettings, build_shards
from trainers.training.run_settings import RunSettings


@dataclass(frozen=True, kw_only=True)
class Settings(DatastoreSettings):
    """The datastore, and how drafts are made from it."""

    config: Config = field(default_factory=Config)


needs = evaluation.needs


def fit(settings: Settings, target: Target, rows: Sequence[Example], run: RunSettings, output: Path) -> Drafter:
    """Returns the drafter with a datastore of the rows' text, whose shards stay in `output` until the run finishes."""
    return Drafter(settings.config, target, build_shards(settings, rows, target.vocab_size, run, output))


def evaluate(drafter: Drafter, batch: Batch, settings: Settings, target: Target) -> Metrics:
    """Returns the accepted tokens per round; text learned while decoding is dropped afterwards."""
    return evaluation.evaluate(Drafter(drafter.config, target, drafter.shards), batch, settings, target)
