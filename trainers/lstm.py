"""Distils an LSTM from the target (DistillSpec, 2310.08461), regularised as AWD-LSTM (1708.02182)."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from data.batches import Batch, Example
from draftsmith import Target
from draftsmith.core.model_info import TargetFacts
from draftsmith.drafters.lstm import Config, Drafter
from draftsmith.parts.neural import cross_attention
from draftsmith.parts.neural.shortlist import check_size
from trainers import Metrics, Needs
from trainers.corpora import corpus
from trainers.parts import distillation
from trainers.training.settings import part_of


@dataclass(frozen=True, kw_only=True)
class Settings(distillation.LossSettings):
    """The network, its loss, and the drafts to be made with it."""

    hidden_size: int = 512
    """Width of its layers."""
    num_layers: int = 1
    """Layers."""
    rank: int = 256
    """Of the map from features to logits, if the target's output matrix is wider than that."""
    shortlist: int = 0
    """If not 0, only so many tokens get logits, those most frequent in the training text; others are not drafted."""
    copy: bool = False
    """Whether tokens may be copied from an encoder-decoder target's source, by a law of their own."""
    dropout: float = 0.0
    """Share of inputs and features left out, the same ones at all positions of a text."""
    drop_connect: float = 0.0
    """Share left out of the weights between one position and the next."""
    num_draft: int = 8
    """Most tokens drafted at a time."""
    length: str = "refit=0.4"
    """How long its chains are, unless told otherwise: a policy of draftsmith/length/policies.py, and its number."""
    width: int = 0
    """If not 0, draft trees that grow where it is confident: so many nodes a level are given so many children."""
    tree_nodes: int = 16
    """Nodes of such a tree."""

    def __post_init__(self) -> None:
        for name in ("dropout", "drop_connect"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 0 and less than 1")
        super().__post_init__()
        self.config()

    def config(self) -> Config:
        """Returns the drafter's own; raises ValueError for one that cannot be."""
        return part_of(Config, self, num_nodes=self.tree_nodes)


def check(settings: Settings, target: TargetFacts) -> None:
    """Raises ValueError for what this target does not have: a source to copy from, trees, or so many tokens."""
    cross_attention.check(target, copies=settings.copy, width=settings.width)
    check_size(settings.shortlist, target.vocab_size)


def build(settings: Settings, target: Target) -> Drafter:
    drafter = Drafter(settings.config(), target).float()
    drafter.ends.init_principal_directions()
    return drafter


def prepare(drafter: Drafter, settings: Settings, target: Target, rows: Sequence[Example]) -> None:
    """Gives the drafter its shortlist."""
    corpus.fill_shortlist(drafter.ends.shortlist, rows)


def needs(settings: Settings, target: Target) -> Needs:
    return distillation.needs(settings, target)


def loss(drafter: Drafter, batch: Batch, settings: Settings, target: Target) -> tuple[Tensor, Metrics]:
    features_BTH = drafter(batch.tokens_BT, batch.source, dropout=settings.dropout, drop_connect=settings.drop_connect)
    return distillation.loss(features_BTH, drafter.head(batch.source), batch, settings, target, drafter.ends.shortlist)


def evaluate(drafter: Drafter, batch: Batch, settings: Settings, target: Target) -> Metrics:
    features_BTH, head = drafter(batch.tokens_BT, batch.source), drafter.head(batch.source)
    return distillation.evaluate(features_BTH, head, batch, target, num_draft=settings.num_draft)


transform_batch, self_generated = distillation.transform_batch, distillation.self_generated
measure_costs, summarise, BEST_METRIC = distillation.measure_costs, distillation.summarise, distillation.BEST_METRIC
