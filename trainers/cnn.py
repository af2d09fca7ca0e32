"""Distils causal gated convolutions from the target (DistillSpec, 2310.08461; 1612.08083)."""

from dataclasses import dataclass, field

from torch import Tensor

from data.batches import Batch
from draftsmith import Target
from draftsmith.drafters.cnn import Config, Drafter
from draftsmith.parts.checks import check_below_one
from trainers import Metrics
from trainers.parts import distillation


@dataclass(frozen=True, kw_only=True)
class Settings(distillation.LossSettings):
    """The network, its loss, and how drafts are made."""

    config: Config = field(default_factory=Config, metadata={"flags": {"num_nodes": "tree_nodes"}})
    dropout: float = 0.0
    """Dropout probability of each layer's inputs."""

    def __post_init__(self) -> None:
        check_below_one(self, "dropout")
        super().__post_init__()


check, prepare, needs = distillation.check_network, distillation.fill_shortlist, distillation.needs


def build(settings: Settings, target: Target) -> Drafter:
    """Returns a new network in float32."""
    drafter = Drafter(settings.config, target).float()
    drafter.tied_head.init_principal_directions()
    return drafter


def loss(drafter: Drafter, batch: Batch, settings: Settings, target: Target) -> tuple[Tensor, Metrics]:
    """Returns the loss of `LossSettings`, summed over supervised tokens."""
    features_BTC = drafter(batch.tokens_BT, batch.source, dropout=settings.dropout)
    return distillation.network_loss(features_BTC, drafter, batch, settings, target)


evaluate = distillation.evaluate_network
transform_batch, self_generated = distillation.transform_batch, distillation.self_generated
measure_costs, summarise, BEST_METRIC = distillation.measure_costs, distillation.summarise, distillation.BEST_METRIC
