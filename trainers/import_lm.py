"""Makes an artifact of a published draft model, a GGUF file or a transformers folder, without training it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data.batches import Batch, Example
from draftsmith import Target
from draftsmith.drafters.lm import Config, Drafter
from draftsmith.length import policies
from draftsmith.loading.gguf_contents import check_tokens, read_values
from draftsmith.loading.gguf_files import find_gguf, read_header
from draftsmith.loading.model_info import TargetInfo, read_target_info
from draftsmith.parts.checks import MAX_NODES, check_at_least
from trainers import Metrics, Needs, distill
from trainers.training.run_settings import RunSettings

HEADS = ("eagle3", "dflash")
"""Architectures of GGUF files that hold a head, and no model."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The published model and the length of the drafts made with it."""

    init: str
    """GGUF file, transformers folder or hub name of a model with the target's tokenizer."""
    num_draft: int = Config.num_draft
    """Number of tokens drafted in sequence, at most."""
    length: str = Config.length
    """Default length policy: its name in draftsmith/length/policies.py, and its number."""

    def __post_init__(self) -> None:
        check_at_least(self, 1, "num_draft", most=MAX_NODES)
        policies.make(self.length)


def check(settings: Settings, target: TargetInfo) -> None:
    """Raises ValueError, before weights load, for another kind of model or one of another tokenizer."""
    if (gguf := find_gguf(settings.init)) is None:
        distill.check(_distillation(settings), target)
        return
    architecture = read_header(gguf).architecture
    if architecture in HEADS:
        raise ValueError(
            f"{gguf} holds a head of architecture {architecture!r}, no draft model; ./launch.sh import_eagle3 imports"
            " EAGLE-3 heads"
        )
    # By tokens rather than by the tokenizers' hashes: a file lists the padding of the embedding too.
    check_tokens(read_values(gguf, "tokenizer."), gguf, target)
    if read_target_info(settings.init).is_encoder_decoder:
        raise ValueError(f"{gguf} holds an encoder-decoder; a draft model in a GGUF file is a decoder")


def needs(settings: Settings, target: Target) -> Needs:
    return distill.needs(_distillation(settings), target)


def evaluate(drafter: Drafter, batch: Batch, settings: Settings, target: Target) -> Metrics:
    return distill.evaluate(drafter, batch, _distillation(settings), target)


def fit(settings: Settings, target: Target, rows: Sequence[Example], run: RunSettings, output: Path) -> Drafter:
    """Returns the model as a drafter, in the target's dtype."""
    return distill.build(_distillation(settings), target).to(target.dtype).eval()


def _distillation(settings: Settings) -> distill.Settings:
    config = Config(model={}, num_draft=settings.num_draft, length=settings.length)
    return distill.Settings(init=settings.init, config=config)
