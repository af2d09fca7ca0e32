"""Distils a small LM from the target (DistillSpec, 2310.08461), on its text or its distributions.

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
from draftsmith.core.sampling import Sampling
from draftsmith.drafters.lm import Config, Drafter
from draftsmith.loading import remote_code
from draftsmith.loading.model_info import TargetInfo, read_target_info
from draftsmith.loading.target_names import model_folder
from draftsmith.loading.weights import load_model
from draftsmith.parts.checks import MAX_DEPTH, MAX_NODES, MAX_WIDTH, check_at_least
from draftsmith.parts.neural.shortlist import check_size
from trainers import Metrics
from trainers.compression import constraints
from trainers.corpora import corpus
from trainers.parts import distillation, small_models, trees
from trainers.parts.distillation import before_supervised
from trainers.parts.fused.linear_cross_entropy import matrix_of
from trainers.parts.losses import sum_in_chunks

NUM_RANKS = 6


@dataclass(frozen=True, kw_only=True)
class Settings(distillation.LossSettings, constraints.WeightConstraints):
    """The draft model, its initial weights, its loss, and how drafts are made."""

    init: str = ""
    """Transformers folder or hub name of a model with the target's vocabulary to start from; empty for a new model."""
    num_layers: int = 1
    """Number of layers of a new model; for an encoder-decoder target, of its decoder."""
    encoder_layers: int = 0
    """Number of encoder layers of a new model for an encoder-decoder target; 0 uses the target's encoder."""
    hidden_size: int = 0
    """Width of a new model, 0 for the target's."""
    num_heads: int = 4
    """Number of attention heads of a new model."""
    ffn_size: int = 0
    """Width of a new model's feed-forward layers, 0 for 8/3 of hidden_size."""
    start: str = field(default="embedding", metadata={"choices": ["random", "embedding", "layers"]})
    """Initial weights of a new model: random; the target's embedding, if the widths are the same; or the target's
    embedding, head and first layers, with its architecture and width."""
    config: Config = field(
        default=Config(model={}),
        metadata={
            "omit": ("model", "target_encoder", "quantised", "tree", "siblings", "width"),
            "flags": {"num_nodes": "tree_nodes"},
        },
    )
    shape: str = field(default="chain", metadata={"choices": ["chain", "tree", "grown"]})
    """Shape of drafts: a chain; a static tree computed from held-out acceptance and measured costs; or a dynamic tree
    (grown)."""
    tree_temperature: float = 0.0
    """Temperature for which the static tree is computed; 0 is greedy."""
    width: int = 4
    """Number of nodes expanded per level of a dynamic tree, and of children of each."""

    def __post_init__(self) -> None:
        check_at_least(self, 1, "num_layers", "num_heads", most=MAX_DEPTH)
        check_at_least(self, 1, "width", most=MAX_NODES)
        check_at_least(self, 0, "encoder_layers", most=MAX_DEPTH)
        check_at_least(self, 0, "hidden_size", "ffn_size", most=MAX_WIDTH)
        check_at_least(self, 0, "tree_temperature", most=100)
        is_copied = self.init or self.start == "layers"
        if self.config.rank and is_copied:
            given = "init" if self.init else "start layers"
            raise ValueError(
                f"rank ties a new model to the target's embedding and head, and {given} has its own: drop one"
            )
        if self.encoder_layers and is_copied:
            raise ValueError("encoder_layers is for a new model; init and start layers already have an encoder")
        super().__post_init__()


def check(settings: Settings, target: TargetInfo) -> None:
    """Raises ValueError for settings that do not fit the target, or a checkpoint of another vocabulary or tokenizer."""
    check_size(settings.config.shortlist, target.vocab_size)
    if target.is_encoder_decoder and settings.shape != "chain":
        raise ValueError(f"shape is {settings.shape}, and {target.name} is an encoder-decoder: it verifies chains only")
    if settings.encoder_layers and not target.is_encoder_decoder:
        raise ValueError(f"encoder_layers is {settings.encoder_layers}, and {target.name} is not an encoder-decoder")
    if not settings.init:
        return
    init_info = read_target_info(settings.init)
    if init_info.is_quantised:
        raise ValueError(f"--init {settings.init} is quantised and cannot be trained; train it before quantising it")
    if init_info.is_encoder_decoder and not target.is_encoder_decoder:
        raise ValueError(f"--init {settings.init} is an encoder-decoder and target {target.name} is not")
    hashes = [one.tokenizer_hash for one in (init_info, target) if one.tokenizer_hash]
    if len(set(hashes)) == 2:
        raise ValueError(f"--init {settings.init} has another tokenizer than target {target.name}")
    # Models of one tokenizer may differ in the padding of their embedding, which `build` removes or adds.
    if init_info.vocab_size != target.vocab_size and len(hashes) < 2:
        raise ValueError(
            f"--init {settings.init} has a vocabulary of {init_info.vocab_size} tokens and the target one of"
            f" {target.vocab_size}; they must be the same, or both folders have the same tokenizer"
        )


def build(settings: Settings, target: Target) -> Drafter:
    """Returns a draft model in float32; raises ValueError for an invalid shape."""
    if settings.init:
        auto = AutoModelForSeq2SeqLM if read_target_info(settings.init).is_encoder_decoder else AutoModelForCausalLM
        options = {"dtype": torch.float32, "trust_remote_code": remote_code.is_allowed()}
        given = load_model(auto, model_folder(settings.init), **options)
        if given.get_input_embeddings().num_embeddings != target.vocab_size:
            given.resize_token_embeddings(target.vocab_size)
        return _with_weights(_drafter(settings, given.config, target), given)
    if settings.start == "layers":
        return _first_layers(settings, target)
    config = _new_model_config(settings, target)
    drafter = _drafter(settings, config, target, target_encoder=not settings.encoder_layers)
    _init_embedding_and_head(drafter, settings, target)
    return drafter


def prepare(drafter: Drafter, settings: Settings, target: Target, rows: Sequence[Example]) -> None:
    """Applies the weight constraints and fills the shortlist."""
    constraints.constrain_weights(drafter.model, settings)
    corpus.fill_shortlist(drafter.shortlist, rows)


needs = distillation.needs


def loss(drafter: Drafter, batch: Batch, settings: Settings, target: Target) -> tuple[Tensor, Metrics]:
    """Returns the loss of `LossSettings`, summed over supervised tokens."""
    head = _head(drafter) if drafter.shortlist.is_whole else drafter.model.get_output_embeddings().listed
    own, is_product = drafter.model.get_output_embeddings(), drafter.draft_model.head_is_linear
    matrix = matrix_of(own, batch.tokens_BT.device) if drafter.shortlist.is_whole and is_product else None
    return distillation.loss(_normed(drafter, batch), head, batch, settings, target, drafter.shortlist, matrix=matrix)


def evaluate(drafter: Drafter, batch: Batch, settings: Settings, target: Target) -> Metrics:
    """Returns the metrics of `distillation.evaluate`."""
    num_draft = settings.config.num_draft
    return distillation.evaluate(_normed(drafter, batch), _head(drafter), batch, target, num_draft=num_draft)


transform_batch, self_generated = distillation.transform_batch, distillation.self_generated
measure_costs, summarise, BEST_METRIC = distillation.measure_costs, distillation.summarise, distillation.BEST_METRIC


@torch.no_grad()
def finish(drafter: Drafter, settings: Settings, target: Target, held_out: list[Batch]) -> Drafter:
    """Returns the drafter with drafts of the configured shape, a static tree computed for this machine."""
    if settings.shape == "chain":
        return drafter
    changes: dict[str, Any] = {"width": settings.width}
    if settings.shape == "tree":
        changes = {"tree": _tree(drafter, settings, target, held_out)}
        print(f"tree of {len(changes['tree'])} nodes, {max(map(len, changes['tree']))} deep")
    finished = Drafter(dataclasses.replace(drafter.config, length="fixed", **changes), target)
    finished.load_state_dict(drafter.state_dict())
    return finished.eval()


def _tree(drafter: Drafter, settings: Settings, target: Target, held_out: list[Batch]) -> tuple[trees.NodePath, ...]:
    sampling, counts_R, total = Sampling(temperature=settings.tree_temperature), torch.zeros(NUM_RANKS), 0
    head = _head(drafter)

    def ranks(normed_ND: Tensor, theirs_ND: Tensor) -> Tensor:
        return trees.accepted_ranks(target.logits(theirs_ND[None])[0], head(normed_ND), sampling, NUM_RANKS)

    for batch in held_out:
        both = (before_supervised(part, batch) for part in (_normed(drafter, batch), batch.hidden[target.num_layers]))
        sums_R, count = sum_in_chunks(ranks, *both, vocab_size=target.vocab_size)
        counts_R, total = counts_R + sums_R.cpu(), total + count
    cost_ms = trees.round_ms(target, drafter.draft_model)
    sizes = {"max_nodes": settings.config.num_nodes, "max_depth": settings.config.num_draft}
    return tuple(trees.best_tree((counts_R / max(total, 1)).tolist(), cost_ms, **sizes)) or ((0,),)


def _normed(drafter: Drafter, batch: Batch) -> Tensor:
    """Returns the draft model's last normed hidden state [B, T, D].

    Calls the model's own modules, because DeepSpeed does not hook weight-sharing copies of them.
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
    model = small_models.as_dict(config)
    own = dataclasses.replace(settings.config, model=model, target_encoder=target_encoder)
    return Drafter(own, target).float()


def _new_model_config(settings: Settings, target: Target) -> PreTrainedConfig:
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
        # T5 needs an encoder layer, even if the target's encoder replaces it.
        num_encoder_layers=max(settings.encoder_layers, 1),
        has_own_head=not settings.config.rank,
    )


@torch.no_grad()
def _init_embedding_and_head(drafter: Drafter, settings: Settings, target: Target) -> None:
    """Initialises a new model's embedding and head by `settings.start`."""
    embedding, head = drafter.model.get_input_embeddings(), drafter.model.get_output_embeddings()
    theirs = target.model.get_input_embeddings().weight
    if settings.config.rank:
        head.init_principal_directions()
        if settings.start == "embedding" and embedding.map.in_features == embedding.map.out_features:
            nn.init.eye_(embedding.map.weight)
    elif settings.start == "embedding" and embedding.weight.shape == theirs.shape:
        # The entries of a T5's embedding are of size 1.
        size = theirs.float().square().mean().sqrt() if target.is_encoder_decoder else 1.0
        embedding.weight.copy_(theirs.float() / size)


def _first_layers(settings: Settings, target: Target) -> Drafter:
    """Returns a copy of the target's, or its decoder's, first layers with its embedding, final norm and head."""
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
    """Returns the drafter with the weights of a model that has at least all of the drafter's weights."""
    own, theirs = drafter.model.state_dict(), model.state_dict()
    assert all(name in theirs for name, _ in drafter.model.named_parameters())
    drafter.model.load_state_dict(own | {name: theirs[name] for name in own.keys() & theirs.keys()})
    return drafter
