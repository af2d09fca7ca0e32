"""Makes an artifact of the MTP heads in the target's own checkpoint, read by draftsmith/artifacts/published/mtp.py."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data.batches import Batch, Example
from draftsmith import Target
from draftsmith.artifacts.published.mtp import text_config, to_drafter
from draftsmith.artifacts.published.mtp_forms import Head, required
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
    """The heads that are read, and the shape of the drafts made with them."""

    num_heads: int = 0
    """Number of heads to read, the first ones; 0 for all of the checkpoint."""
    num_draft: int = 3
    """Number of tokens drafted in sequence, at most, by a head each and then by the last, applied to its own output."""
    shortlist: int = 0
    """If not 0, compute logits only for this many tokens, those most frequent in the text."""
    length: str = "fixed"
    """Default length policy: its name in draftsmith/length/policies.py, and its number."""

    def __post_init__(self) -> None:
        check_at_least(self, 1, "num_draft", most=MAX_NODES)
        check_at_least(self, 0, "shortlist", "num_heads")
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
    """Returns the drafter's configuration; raises ValueError if the checkpoint has no heads of a known form."""
    config = Config(
        model={},
        num_heads=len(_heads(settings, target)),
        shortlist=settings.shortlist,
        num_draft=settings.num_draft,
        length=settings.length,
    )
    return mtp.with_layer(config, target, text_config(target))


def _heads(settings: Settings, target: TargetInfo | Target) -> list[Head]:
    """Returns the heads to read; raises ValueError if the checkpoint has fewer."""
    heads = required(target)
    if settings.num_heads > len(heads):
        raise ValueError(
            f"num_heads is {settings.num_heads}; {heads[0].folder} has {len(heads)} that can be read: omit --num-heads"
        )
    return heads[: settings.num_heads or len(heads)]


def fit(settings: Settings, target: Target, rows: Sequence[Example], run: RunSettings, output: Path) -> Drafter:
    """Returns the heads as a drafter; raises ValueError for tensors that are missing, unknown or of another shape."""
    heads = _heads(settings, target)
    if (there := heads[0].num_heads) > len(heads):
        imported = "the first is" if len(heads) == 1 else f"the first {len(heads)} are"
        print(f"{heads[0].folder} has {there} MTP heads; {imported} imported, and the last applied to its own output")
    drafter = Drafter(config_of(settings, target), target)
    drafter.load_state_dict(drafter.state_dict() | to_drafter(heads, drafter))
    corpus.fill_shortlist(drafter.shared_head.shortlist, rows)
    return drafter.eval()
