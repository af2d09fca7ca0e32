"""Distils a small causal LM from the target (DistillSpec, 2310.08461): on its text, or on its laws as well.

Shape suffixes: B rows, T positions, N supervised positions, D hidden width, R ranks.
"""

import copy
import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig

from data.batches import Batch
from draftsmith import Target, length
from draftsmith.drafters.lm import Config, Drafter
from draftsmith.facts import TargetFacts, read_facts
from draftsmith.sampling import Sampling
from trainers import Metrics, Needs, distillation, small_models, trees
from trainers.distillation import before_supervised
from trainers.losses import chunked

NUM_RANKS = 6


@dataclass(frozen=True, kw_only=True)
class Settings(distillation.Loss):
    """The draft model, what it starts from, and its loss."""

    init: str = ""
    """Transformers folder or hub name of a model with the target's vocabulary to start from, instead of a new one."""
    num_layers: int = 1
    """Layers of a new model."""
    hidden_size: int = 0
    """Width of a new model, 0 for the target's."""
    num_heads: int = 4
    """Attention heads of a new model."""
    ffn_size: int = 0
    """Width of its feed-forward layers, 0 for 8/3 of hidden_size."""
    start: str = field(default="embedding", metadata={"choices": ["random", "embedding", "layers"]})
    """Weights of a new model: random, with the target's embedding where the widths are the same, or, for a model of
    the target's own architecture and width, its embedding, head and first layers."""
    num_draft: int = 8
    """Most tokens drafted at a time."""
    length: str = "refit=0.4"
    """How long its chains are, unless told otherwise: a policy of draftsmith/length.py, and its number."""
    shape: str = field(default="chain", metadata={"choices": ["chain", "tree", "grown"]})
    """Of its drafts: a chain; a fixed tree computed from held-out acceptance and measured costs; or a tree that grows
    where the draft model is confident, `width` nodes a level with as many children each."""
    tree_temperature: float = 0.0
    """What the fixed tree is computed for; 0 is greedy."""
    width: int = 4
    """Of trees that grow."""
    tree_nodes: int = 16
    """Nodes of a tree: most of a fixed one, all of one that grows."""

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_heads", "num_draft", "width", "tree_nodes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        length.make(self.length)
        for name in ("hidden_size", "ffn_size"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must not be negative")
        super().__post_init__()


def check(settings: Settings, target: TargetFacts) -> None:
    """Raises ValueError for a checkpoint of another vocabulary or tokenizer, from its folder alone."""
    if not settings.init:
        return
    facts = read_facts(settings.init)
    if facts.vocab_size != target.vocab_size:
        raise ValueError(
            f"--init {settings.init} has a vocabulary of {facts.vocab_size} tokens and the target one of"
            f" {target.vocab_size}; they must be the same"
        )
    if facts.tokenizer_hash and target.tokenizer_hash and facts.tokenizer_hash != target.tokenizer_hash:
        raise ValueError(f"--init {settings.init} has another tokenizer than target {target.name}")


def build(settings: Settings, target: Target) -> Drafter:
    """Returns a draft model in float32; raises ValueError for a shape that cannot be."""
    if settings.init:
        given = AutoModelForCausalLM.from_pretrained(settings.init, dtype=torch.float32)
        drafter = _drafter(settings, given.config, target)
        drafter.model.load_state_dict(given.state_dict())
        return drafter
    if settings.start == "layers":
        return _first_layers(settings, target)
    drafter = _drafter(settings, _small_llama(settings, target), target)
    theirs = target.model.get_input_embeddings().weight
    own = drafter.model.get_input_embeddings().weight
    if settings.start == "embedding" and own.shape == theirs.shape:
        own.data.copy_(theirs.detach())
    return drafter


def needs(settings: Settings, target: Target) -> Needs:
    return distillation.needs(settings, target)


def loss(drafter: Drafter, batch: Batch, settings: Settings, target: Target) -> tuple[Tensor, Metrics]:
    return distillation.loss(_normed(drafter, batch), _head(drafter), batch, settings, target)


def judge(drafter: Drafter, batch: Batch, settings: Settings, target: Target) -> Metrics:
    return distillation.judge(_normed(drafter, batch), _head(drafter), batch, target)


@torch.no_grad()
def finish(drafter: Drafter, settings: Settings, target: Target, held_out: list[Batch]) -> Drafter:
    """Returns the drafter with drafts of the shape asked for, a fixed tree computed for this machine."""
    if settings.shape == "chain":
        return drafter
    changes: dict[str, Any] = {"width": settings.width, "num_nodes": settings.tree_nodes}
    if settings.shape == "tree":
        changes = {"tree": _tree(drafter, settings, target, held_out)}
        print(f"tree of {len(changes['tree'])} nodes, {max(map(len, changes['tree']))} deep")
    finished = Drafter(dataclasses.replace(drafter.config, length="fixed", **changes), target)
    finished.load_state_dict(drafter.state_dict())
    return finished.eval()


def _tree(drafter: Drafter, settings: Settings, target: Target, held_out: list[Batch]) -> tuple[trees.Path, ...]:
    sampling, counts_R, total = Sampling(temperature=settings.tree_temperature), torch.zeros(NUM_RANKS), 0
    head = _head(drafter)

    def ranks(normed_ND: Tensor, theirs_ND: Tensor) -> Tensor:
        return trees.accepted_ranks(target.logits(theirs_ND[None])[0], head(normed_ND), sampling, NUM_RANKS)

    for batch in held_out:
        both = (before_supervised(part, batch) for part in (_normed(drafter, batch), batch.hidden[target.num_layers]))
        sums_R, count = chunked(ranks, *both, vocab_size=target.vocab_size)
        counts_R, total = counts_R + sums_R.cpu(), total + count
    cost_ms = trees.round_ms(target, drafter.engine)
    sizes = {"max_nodes": settings.tree_nodes, "max_depth": settings.num_draft}
    return tuple(trees.best_tree((counts_R / max(total, 1)).tolist(), cost_ms, **sizes)) or ((0,),)


def _normed(drafter: Drafter, batch: Batch) -> Tensor:
    """Returns the draft model's last normed hidden state [B, T, D].

    By the model's own modules: DeepSpeed would not know its engine's views of them.
    """
    return drafter.model.get_decoder()(input_ids=batch.tokens_BT, use_cache=False).last_hidden_state


def _head(drafter: Drafter) -> distillation.Head:
    return lambda normed_ND: drafter.engine.head(normed_ND[None])[0]


def _drafter(settings: Settings, config: PreTrainedConfig, target: Target) -> Drafter:
    """Returns a drafter with a model of this configuration and random weights."""
    return Drafter(
        Config(model=small_models.as_dict(config), num_draft=settings.num_draft, length=settings.length), target
    ).float()


def _small_llama(settings: Settings, target: Target) -> PreTrainedConfig:
    width = settings.hidden_size or target.hidden_size
    if width % (2 * settings.num_heads):
        raise ValueError(f"hidden_size {width} must be a multiple of twice num_heads, which is {settings.num_heads}")
    theirs = target.model.config.get_text_config(decoder=True)
    special = {name: getattr(theirs, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return small_models.llama(
        vocab_size=target.vocab_size,
        width=width,
        num_layers=settings.num_layers,
        num_heads=settings.num_heads,
        context_length=target.context_length,
        ffn_size=settings.ffn_size,
        **special,
    )


def _first_layers(settings: Settings, target: Target) -> Drafter:
    """Returns a copy of the target cut to its first layers, embedding, final norm and head kept."""
    if settings.num_layers > target.num_layers:
        raise ValueError(f"num_layers is {settings.num_layers}; {target.name} has {target.num_layers} layers to copy")
    config = copy.deepcopy(target.model.config)
    text = config.get_text_config(decoder=True)
    text.num_hidden_layers = settings.num_layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[: settings.num_layers]
    drafter = _drafter(settings, config, target)
    theirs = target.model.state_dict()
    drafter.model.load_state_dict({name: theirs[name] for name in drafter.model.state_dict()})
    return drafter
