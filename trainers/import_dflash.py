"""Makes an artifact of a published DFlash drafter, read by draftsmith/artifacts/published/dflash.py."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from data.batches import Batch, Example
from draftsmith import Target
from draftsmith.artifacts.published import dflash as published_dflash
from draftsmith.artifacts.published.eagle3 import add_vocabulary
from draftsmith.artifacts.published.folders import load_tensors
from draftsmith.drafters.dflash import Config, Drafter
from draftsmith.length import policies
from draftsmith.loading.model_info import TargetInfo
from draftsmith.parts.checks import MAX_NODES, check_at_least
from trainers import Metrics, Needs, dflash
from trainers.training.run_settings import RunSettings

NOTHING_TO_ESTIMATE = "nothing is trained: it converts a published drafter"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The published drafter and the shape of the drafts made with it."""

    head: str
    """Folder with the drafter's config.json and weights."""
    tree_nodes: int = 0
    """Number of nodes of draft trees, 0 for chains."""
    length: str = "fixed"
    """Default length policy of chains: its name in draftsmith/length/policies.py, and its number."""
    num_anchors: int = 16
    """Number of blocks per held-out row that it is evaluated on."""

    def __post_init__(self) -> None:
        check_at_least(self, 0, "tree_nodes", most=MAX_NODES)
        check_at_least(self, 1, "num_anchors", most=2**16)
        policies.make(self.length)


def check(settings: Settings, target: TargetInfo) -> None:
    """Raises ValueError, from config.json alone, for another kind of drafter or one for another target."""
    config_of(settings, target)


def needs(settings: Settings, target: Target) -> Needs:
    return Needs(layers=config_of(settings, target).layers)


def evaluate(drafter: Drafter, batch: Batch, settings: Settings, target: Target) -> Metrics:
    return dflash.slot_metrics(drafter, batch, settings.num_anchors)


def config_of(settings: Settings, target: TargetInfo | Target) -> Config:
    """Returns the drafter's configuration; raises ValueError for anything but a DFlash drafter for this target."""
    published = published_dflash.read(Path(settings.head), target)
    config = Config(**published.shape, shortlist=published.draft_vocab, num_nodes=settings.tree_nodes)
    return dataclasses.replace(config, length=settings.length)


def fit(settings: Settings, target: Target, rows: Sequence[Example], run: RunSettings, output: Path) -> Drafter:
    """Returns the drafter; raises ValueError for tensors that are missing, unknown or of another shape."""
    config, folder = config_of(settings, target), Path(settings.head)
    tensors = published_dflash.read_weights(folder)
    drafter = Drafter(config, target)
    shortlist = drafter.shared_head.shortlist
    if not shortlist.is_whole:
        add_vocabulary(tensors, folder, num_tokens=len(shortlist), vocab_size=target.vocab_size)
        ids_W = tensors["d2t"] + torch.arange(len(shortlist))
        tensors["shared_head.shortlist.ids_W"] = ids_W
        _check_copy(tensors.get("lm_head"), target.model.get_output_embeddings().weight[ids_W], "lm_head", folder)
    elif "lm_head" in tensors:
        _check_copy(tensors["lm_head"], target.model.get_output_embeddings().weight, "lm_head", folder)
    if "embed_tokens" in tensors:
        _check_copy(tensors["embed_tokens"], target.model.get_input_embeddings().weight, "embed_tokens", folder)
    own = {name: tensor for name, tensor in tensors.items() if "." in name}
    load_tensors(drafter, own, folder, kind="drafter", described_by="config.json")
    return drafter.eval()


def _check_copy(found: torch.Tensor | None, expected: torch.Tensor, name: str, folder: Path) -> None:
    """Raises ValueError unless a tensor is the target's own, compared in bfloat16 as either may be stored in less."""
    if found is None:
        return
    if found.shape != expected.shape or not torch.equal(found.bfloat16().cpu(), expected.bfloat16().cpu()):
        raise ValueError(
            f"{folder}: {name} is not the target's; drafters with an embedding or a head of their own are not supported"
        )
