"""Builds the datastore of REST, 2311.08252: suffix arrays of documents, without training."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data.batches import Example
from draftsmith import Target
from draftsmith.drafters.rest import Config, Drafter
from trainers.corpora import evaluation
from trainers.corpora.suffix_arrays import DatastoreSettings, build_shards
from trainers.training.run_settings import RunSettings


@dataclass(frozen=True, kw_only=True)
class Settings(DatastoreSettings):
    """The datastore, and how drafts are made from it."""

    config: Config = field(default_factory=Config)


needs, evaluate = evaluation.needs, evaluation.evaluate


def fit(settings: Settings, target: Target, rows: Sequence[Example], run: RunSettings, output: Path) -> Drafter:
    """Returns the drafter with a datastore of the rows' text, whose shards stay in `output` until the run finishes."""
    return Drafter(settings.config, target, build_shards(settings, rows, target.vocab_size, run, output))
