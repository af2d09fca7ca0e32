"""Makes an artifact of a published EAGLE-3 head, a folder or a GGUF file, read by draftsmith/artifacts/published/."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from data.batches import Batch, Example
from draftsmith import Target
from draftsmith.artifacts.published import eagle3 as head_folders
from draftsmith.artifacts.published import eagle3_gguf as gguf_heads
from draftsmith.artifacts.published.folders import load_tensors
from draftsmith.drafters.eagle3 import Config, Drafter
from draftsmith.length import policies
from draftsmith.loading.model_info import TargetInfo
from draftsmith.parts.checks import MAX_NODES, check_at_least
from trainers import Metrics, Needs, eagle3
from trainers.training.run_settings import RunSettings

NOTHING_TO_ESTIMATE = "nothing is trained: it converts a published head"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The published head and the shape of the drafts made with it."""

    head: str
    """Folder with the head's config.json and weights, or a GGUF file of llama.cpp's architecture eagle3."""
    num_draft: int = 5
    """Number of tokens drafted in sequence, at most."""
    width: int = 4
    """Width of dynamic draft trees, which grow where the head is confident; 0 drafts chains."""
    tree_nodes: int = 16
    """Number of nodes of such a tree."""
    length: str = "fixed"
    """Default length policy of chains: its name in draftsmith/length/policies.py, and its number."""

    def __post_init__(self) -> None:
        check_at_least(self, 1, "num_draft", "tree_nodes", most=MAX_NODES)
        check_at_least(self, 0, "width", most=MAX_NODES)
        policies.make(self.length)


def check(settings: Settings, target: TargetInfo) -> None:
    """Raises ValueError, before the target's weights load, for another kind of head or one for another target."""
    config_of(settings, target)


def needs(settings: Settings, target: Target) -> Needs:
    return Needs(layers=config_of(settings, target).layers)


def evaluate(drafter: Drafter, batch: Batch, settings: Settings, target: Target) -> Metrics:
    return eagle3.metrics_of(drafter, batch, drafter.config.num_draft)


def config_of(settings: Settings, target: TargetInfo | Target) -> Config:
    """Returns the drafter's configuration; raises ValueError for anything but an EAGLE-3 head for this target."""
    reader = gguf_heads if _is_gguf(settings.head) else head_folders
    return Config(
        **reader.read_shape(Path(settings.head), target),
        num_draft=settings.num_draft,
        width=settings.width,
        num_nodes=settings.tree_nodes,
        length=settings.length,
    )


def fit(settings: Settings, target: Target, rows: Sequence[Example], run: RunSettings, output: Path) -> Drafter:
    """Returns the head as a drafter; raises ValueError for tensors that are missing, unknown or of another shape."""
    config, folder = config_of(settings, target), Path(settings.head)
    tensors = gguf_heads.read_weights(folder, target) if _is_gguf(settings.head) else head_folders.read_weights(folder)
    embedding = tensors.get("embedding.weight")
    if embedding is not None and _is_target_embedding(embedding, target):
        del tensors["embedding.weight"]
        embedding = None
    drafter = Drafter(dataclasses.replace(config, own_embedding=embedding is not None), target)
    head_folders.add_vocabulary(tensors, folder, num_tokens=len(drafter.d2t), vocab_size=len(drafter.t2d))
    load_tensors(drafter, tensors, folder, kind="head", described_by="its configuration")
    return drafter.eval()


def _is_gguf(head: str) -> bool:
    return Path(head).suffix.lower() == ".gguf" and Path(head).is_file()


def _is_target_embedding(embedding: Tensor, target: Target) -> bool:
    """Returns whether this is the target's own embedding, compared in bfloat16 as either may be stored in less."""
    weight = target.model.get_input_embeddings().weight
    return embedding.shape == weight.shape and torch.equal(embedding.bfloat16(), weight.bfloat16().cpu())
