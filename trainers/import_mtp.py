"""Makes an artifact of the MTP head in the target's own checkpoint, read by draftsmith/artifacts/published/mtp.py."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data.batches import Batch, Example
from draftsmith import Target
from draftsmith.artifacts.published.mtp import layer_config, text_config, to_drafter
from draftsmith.artifacts.published.mtp_forms import required
from draftsmith.drafters.mtp import Config, Drafter
from draftsmith.length import policies
from draftsmith.loading.model_info import TargetInfo
from draftsmith.parts.checks import MAX_NODES, check_at_least
from draftsmith.parts.neural.shortlist import check_size
from trainers import Metrics, Needs, mtp
from trainers.corpora import corpus
from trainers.training.run_settings import RunSettings

NOTHING_TO_ESTIMATE = "nothing is trained: it converts a head of the target's checkpoint"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The shape of the drafts made with the head."""

    num_draft: int = 3
    """Number of tokens drafted in sequence, at most, by the head applied to its own output."""
    shortlist: int = 0
    """If not 0, compute logits only for this many tokens, those most frequent in the text."""
    length: str = "fixed"
    """Default length policy: its name in draftsmith/length/policies.py, and its number."""

    def __post_init__(self) -> None:
        check_at_least(self, 1, "num_draft", most=MAX_NODES)
        check_at_least(self, 0, "shortlist")
        policies.make(self.length)


def check(settings: Settings, target: TargetInfo) -> None:
    """Raises ValueError, before the target's weights load, for a target without a head of a known form."""
    if target.is_encoder_decoder:
        raise ValueError(f"target {target.name} is an encoder-decoder; MTP heads are of causal targets")
    config_of(settings, target)
    check_size(settings.shortlist, target.vocab_size)


def needs(settings: Settings, target: Target) -> Needs:
    return Needs(layers=(target.num_layers,))


def evaluate(drafter: Drafter, batch: Batch, settings: Settings, target: Target) -> Metrics:
    return mtp.metrics_of(drafter, batch, drafter.config.num_draft)


def config_of(settings: Settings, target: TargetInfo | Target) -> Config:
    """Returns the drafter's configuration; raises ValueError if the checkpoint has no head of a known form."""
    head = required(target)
    return Config(
        model=layer_config(text_config(target), target.name, head),
        shortlist=settings.shortlist,
        num_draft=settings.num_draft,
        length=settings.length,
    )


def fit(settings: Settings, target: Target, rows: Sequence[Example], run: RunSettings, output: Path) -> Drafter:
    """Returns the head as a drafter; raises ValueError for tensors that are missing, unknown or of another shape."""
    head = required(target)
    if head.num_heads > 1:
        print(f"{head.folder} has {head.num_heads} MTP heads; the first is imported, and applied to its own output")
    drafter = Drafter(config_of(settings, target), target)
    drafter.load_state_dict(drafter.state_dict() | to_drafter(head, drafter))
    corpus.fill_shortlist(drafter.shared_head.shortlist, rows)
    return drafter.eval()
