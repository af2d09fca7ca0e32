"""Distils an LSTM from the target (DistillSpec, 2310.08461), regularised as AWD-LSTM (1708.02182)."""

from dataclasses import dataclass, field

from torch import Tensor

from data.batches import Batch
from draftsmith import Target
from draftsmith.drafters.lstm import Config, Drafter
from draftsmith.parts.checks import check_below_one
from trainers import Metrics
from trainers.parts import distillation


@dataclass(frozen=True, kw_only=True)
class Settings(distillation.LossSettings):
    """The network, its loss, and how drafts are made."""

    config: Config = field(default_factory=Config, metadata={"flags": {"num_nodes": "tree_nodes"}})
    dropout: float = 0.0
    """Dropout probability of inputs and features, with one mask for all positions of a text."""
    drop_connect: float = 0.0
    """Dropout probability of the recurrent weights."""

    def __post_init__(self) -> None:
        check_below_one(self, "dropout", "drop_connect")
        super().__post_init__()


check, prepare, needs = distillation.check_network, distillation.fill_shortlist, distillation.needs


def build(settings: Settings, target: Target) -> Drafter:
    """Returns a new LSTM in float32."""
    drafter = Drafter(settings.config, target).float()
    drafter.tied_head.init_principal_directions()
    return drafter


def loss(drafter: Drafter, batch: Batch, settings: Settings, target: Target) -> tuple[Tensor, Metrics]:
    """Returns the loss of `LossSettings`, summed over supervised tokens."""
    features_BTH = drafter(batch.tokens_BT, batch.source, dropout=settings.dropout, drop_connect=settings.drop_connect)
    return distillation.network_loss(features_BTH, drafter, batch, settings, target)


evaluate = distillation.evaluate_network
transform_batch, self_generated = distillation.transform_batch, distillation.self_generated
measure_costs, summarise, BEST_METRIC = distillation.measure_costs, distillation.summarise, distillation.BEST_METRIC
