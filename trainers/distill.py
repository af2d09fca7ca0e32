"""Distils a small LM from the target (DistillSpec, 2310.08461): on its text, or on its laws as well.

Shape suffixes: B rows, T positions, N supervised positions, D hidden width, R ranks.
"""

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedConfig

from data.batches import Batch, Example
from draftsmith import Target
from draftsmith.core.model_info import TargetInfo, read_target_info
from draftsmith.core.sampling import Sampling
from draftsmith.drafters.lm import Config, Drafter
from draftsmith.length import policies
from draftsmith.parts.neural.shortlist import check_size
from trainers import Metrics
from trainers.compression import constraints
from trainers.corpora import corpus
from trainers.parts import distillation, small_models, trees
from trainers.parts.distillation import before_supervised
from trainers.parts.losses import sum_in_chunks
from trainers.training.settings import part_of

NUM_RANKS = 6


@dataclass(frozen=True, kw_only=True)
class Settings(distillation.LossSettings, constraints.WeightConstraints):
    """The draft model, what it starts from, and its loss."""

    init: str = ""
    """Transformers folder or hub name of a model with the target's vocabulary to start from, instead of a new one."""
    num_layers: int = 1
    """Layers of a new model; for an encoder-decoder target, of its decoder."""
    encoder_layers: int = 0
    """Layers of its own encoder for an encoder-decoder target; with 0 it reads what the target's encoder has read."""
    hidden_size: int = 0
    """Width of a new model, 0 for the target's."""
    num_heads: int = 4
    """Attention heads of a new model."""
    ffn_size: int = 0
    """Width of its feed-forward layers, 0 for 8/3 of hidden_size."""
    start: str = field(default="embedding", metadata={"choices": ["random", "embedding", "layers"]})
    """Weights of a new model: random, with the target's embedding where the widths are the same, or, for a model of
    the target's own architecture and width, its embedding, head and first layers."""
    rank: int = 0
    """If not 0, a new model's embedding and head are the target's own, neither trained nor saved, the head by a map of
    this rank: less to multiply for each drafted token."""
    shortlist: int = 0
    """If not 0, only so many tokens get logits, those most frequent in the training text: less to multiply still, and
    the others are never drafted."""
    num_draft: int = 8
    """Most tokens drafted at a time."""
    length: str = "refit=0.4"
    """How long its chains are, unless told otherwise: a policy of draftsmith/length/policies.py, and its number."""
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
        policies.make(self.length)
        for name in ("hidden_size", "ffn_size", "encoder_layers", "rank", "shortlist"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must not be negative")
        if self.rank and (self.init or self.start == "layers"):
            given = "init" if self.init else "start layers"
            raise ValueError(f"rank ties a new model to the target, and {given} brings an embedding and head: drop one")
        if self.encoder_layers and (self.init or self.start == "layers"):
            raise ValueError("encoder_layers is of a new model; init has an encoder, and start layers the target's own")
        super().__post_init__()


def check(settings: Settings, target: TargetInfo) -> None:
    """Raises ValueError for a checkpoint of another vocabulary or tokenizer, from its folder alone."""
    check_size(settings.shortlist, target.vocab_size)
    if target.is_encoder_decoder and settings.shape != "chain":
        raise ValueError(f"shape is {settings.shape}, and {target.name} is an encoder-decoder: it verifies chains only")
    if settings.encoder_layers and not target.is_encoder_decoder:
        raise ValueError(f"encoder_layers is {settings.encoder_layers}, and {target.name} is no encoder-decoder")
    if not settings.init:
        return
    facts = read_target_info(settings.init)
    if facts.is_quantised:
        raise ValueError(f"--init {settings.init} is quantised, and such weights are not trained; heal it before")
    if facts.is_encoder_decoder and not target.is_encoder_decoder:
        raise ValueError(f"--init {settings.init} is an encoder-decoder and target {target.name} is not")
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
        auto = AutoModelForSeq2SeqLM if read_target_info(settings.init).is_encoder_decoder else AutoModelForCausalLM
        given = auto.from_pretrained(settings.init, dtype=torch.float32)
        return _with_weights(_drafter(settings, given.config, target), given)
    if settings.start == "layers":
        return _first_layers(settings, target)
    drafter = _drafter(settings, _small(settings, target), target, target_encoder=not settings.encoder_layers)
    _take_ends(drafter, settings, target)
    return drafter


def prepare(drafter: Drafter, settings: Settings, target: Target, rows: Sequence[Example]) -> None:
    """Gives the drafter its shortlist, and what it starts from its restraint."""
    constraints.constrain_weights(drafter.model, settings)
    corpus.fill_shortlist(drafter.shortlist, rows)


needs = distillation.needs


def loss(drafter: Drafter, batch: Batch, settings: Settings, target: Target) -> tuple[Tensor, Metrics]:
    return distillation.loss(_normed(drafter, batch), _head(drafter), batch, settings, target, drafter.shortlist)


def evaluate(drafter: Drafter, batch: Batch, settings: Settings, target: Target) -> Metrics:
    return distillation.evaluate(_normed(drafter, batch), _head(drafter), batch, target, num_draft=settings.num_draft)


transform_batch, self_generated = distillation.transform_batch, distillation.self_generated
measure_costs, summarise, BEST_METRIC = distillation.measure_costs, distillation.summarise, distillation.BEST_METRIC


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
        sums_R, count = sum_in_chunks(ranks, *both, vocab_size=target.vocab_size)
        counts_R, total = counts_R + sums_R.cpu(), total + count
    cost_ms = trees.round_ms(target, drafter.draft_model)
    sizes = {"max_nodes": settings.tree_nodes, "max_depth": settings.num_draft}
    return tuple(trees.best_tree((counts_R / max(total, 1)).tolist(), cost_ms, **sizes)) or ((0,),)


def _normed(drafter: Drafter, batch: Batch) -> Tensor:
    """Returns the draft model's last normed hidden state [B, T, D].

    By the model's own modules: DeepSpeed would not know its engine's views of them.
    """
    given: dict[str, Any] = {"input_ids": batch.tokens_BT, "use_cache": False}
    source = None if batch.source is None else drafter.read(batch.source)
    if source is not None:
        given |= {"encoder_hidden_states": source.encoded_BTD, "encoder_attention_mask": source.mask_BT}
    return drafter.model.get_decoder()(**given).last_hidden_state


def _head(drafter: Drafter) -> distillation.Head:
    return lambda normed_ND: drafter.draft_model.head(normed_ND[None])[0]


def _drafter(settings: Settings, config: PreTrainedConfig, target: Target, *, target_encoder: bool = False) -> Drafter:
    """Returns a drafter with a model of this configuration and random weights."""
    target_encoder &= target.is_encoder_decoder
    made = part_of(Config, settings, model=small_models.as_dict(config), target_encoder=target_encoder, width=0)
    return Drafter(made, target).float()


def _small(settings: Settings, target: Target) -> PreTrainedConfig:
    """Returns the configuration of a Llama, or of a T5 for an encoder-decoder target."""
    width = settings.hidden_size or target.hidden_size
    if width % (2 * settings.num_heads):
        raise ValueError(f"hidden_size {width} must be a multiple of twice num_heads, which is {settings.num_heads}")
    return small_models.for_target(
        target,
        width=width,
        num_layers=settings.num_layers,
        num_heads=settings.num_heads,
        ffn_size=settings.ffn_size,
        # An encoder that the target's takes the place of is made all the same.
        num_encoder_layers=max(settings.encoder_layers, 1),
        has_own_head=not settings.rank,
    )


@torch.no_grad()
def _take_ends(drafter: Drafter, settings: Settings, target: Target) -> None:
    """Starts a new model's embedding and head as the settings say."""
    words, head = drafter.model.get_input_embeddings(), drafter.model.get_output_embeddings()
    theirs = target.model.get_input_embeddings().weight
    if settings.rank:
        head.init_principal_directions()
        if settings.start == "embedding" and words.map.in_features == words.map.out_features:
            nn.init.eye_(words.map.weight)
    elif settings.start == "embedding" and words.weight.shape == theirs.shape:
        # The entries of a T5's embedding are of size 1.
        size = theirs.float().square().mean().sqrt() if target.is_encoder_decoder else 1.0
        words.weight.copy_(theirs.float() / size)


def _first_layers(settings: Settings, target: Target) -> Drafter:
    """Returns a copy of the target, or of its decoder, cut to its first layers; embedding, final norm and head kept."""
    if settings.num_layers > target.num_layers:
        raise ValueError(f"num_layers is {settings.num_layers}; {target.name} has {target.num_layers} layers to copy")
    config = copy.deepcopy(target.model.config)
    text = config.get_text_config(decoder=True)
    text.num_hidden_layers = 1 if target.is_encoder_decoder else settings.num_layers
    for name in ("num_decoder_layers", "decoder_layers"):
        if target.is_encoder_decoder and hasattr(text, name):
            setattr(text, name, settings.num_layers)
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[: settings.num_layers]
    return _with_weights(_drafter(settings, config, target, target_encoder=True), target.model)


def _with_weights(drafter: Drafter, model: nn.Module) -> Drafter:
    """Returns the drafter with the weights of a model that has all of its own, and perhaps more."""
    own, theirs = drafter.model.state_dict(), model.state_dict()
    assert all(name in theirs for name, _ in drafter.model.named_parameters())
    drafter.model.load_state_dict(own | {name: theirs[name] for name in own.keys() & theirs.keys()})
    return drafter
