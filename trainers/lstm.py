"""Distils an LSTM from the target (DistillSpec, 2310.08461), regularised as AWD-LSTM (1708.02182)."""

from dataclasses import dataclass, field

from torch import Tensor

from data.batches import Batch
from draftsmith import Target
from draftsmith.drafters.lstm import Config, Drafter
from trainers import Metrics, Needs, distillation
from trainers.losses import DIVERGENCES


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The network, its loss, and the drafts to be made with it."""

    hidden_size: int = 512
    """Width of its layers."""
    num_layers: int = 1
    """Layers."""
    rank: int = 256
    """Of the map from features to logits, if the target's output matrix is wider than that."""
    dropout: float = 0.0
    """Share of inputs and features left out, the same ones at all positions of a text."""
    drop_connect: float = 0.0
    """Share left out of the weights between one position and the next."""
    loss: str = field(default="ce", metadata={"choices": ["ce", *DIVERGENCES]})
    """Cross-entropy on the text, or a divergence from the target's law at each of its tokens."""
    beta: float = 0.5
    """Of the Jensen-Shannon divergence (`jsd`)."""
    loss_temperature: float = 1.0
    """Both laws are taken at this temperature in a divergence."""
    teacher_top_k: int = 0
    """A divergence sees so many of the target's largest logits and the rest as one, 0 for all of them."""
    num_draft: int = 8
    """Most tokens drafted at a time."""
    length: str = "refit=0.4"
    """How long its chains are, unless told otherwise: a policy of draftsmith/length.py, and its number."""
    width: int = 0
    """If not 0, draft trees that grow where it is confident: so many nodes a level are given so many children."""
    tree_nodes: int = 16
    """Nodes of such a tree."""

    def __post_init__(self) -> None:
        for name in ("dropout", "drop_connect"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 0 and less than 1")
        distillation.check(self)
        self.config()

    def config(self) -> Config:
        """Returns the drafter's own; raises ValueError for one that cannot be."""
        return Config(
            hidden_size=self.hidden_size,
            num_layers=self.num_layers,
            rank=self.rank,
            num_draft=self.num_draft,
            length=self.length,
            width=self.width,
            num_nodes=self.tree_nodes,
        )


def build(settings: Settings, target: Target) -> Drafter:
    drafter = Drafter(settings.config(), target).float()
    drafter.ends.take_directions()
    return drafter


def needs(settings: Settings, target: Target) -> Needs:
    return distillation.needs(settings, target)


def loss(drafter: Drafter, batch: Batch, settings: Settings, target: Target) -> tuple[Tensor, Metrics]:
    features_BTH = drafter(batch.tokens_BT, dropout=settings.dropout, drop_connect=settings.drop_connect)
    return distillation.loss(features_BTH, drafter.ends.head, batch, settings, target)


def judge(drafter: Drafter, batch: Batch, settings: Settings, target: Target) -> Metrics:
    return distillation.judge(drafter(batch.tokens_BT), drafter.ends.head, batch, target)
