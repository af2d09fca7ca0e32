"""MTP heads of checkpoints as drafters, and drafters as tensors of a checkpoint.

The tensors of a head's layer are named as those of the target's layers, so they are read as layer 0 of a model of one
layer, with transformers' own conversions, of experts for instance.
"""

import copy
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import logging

from draftsmith.artifacts.published.mtp_forms import Form, Head
from draftsmith.core.architectures.supported import ATTENTION
from draftsmith.loading import remote_code
from draftsmith.loading.target_names import model_folder
from draftsmith.loading.weights import NUM_NAMED

OUTER = ("projection.", "embedding_norm.", "hidden_norm.")
"""Prefixes of the drafter's weights outside the layer and the norm after it."""


def text_config(target: Any) -> Any:
    """Returns the transformers configuration of a target's text model, read from its folder or hub name."""
    folder = model_folder(target.name, needs_weights=False)
    return AutoConfig.from_pretrained(folder, trust_remote_code=remote_code.is_allowed()).get_text_config(decoder=True)


def layer_config(config: Any, name: str, form: Form | None) -> dict[str, Any]:
    """Returns the configuration of a model whose only layer is an MTP head's, given that of the target's text model.

    It is a layer of the target's own class. Its kind is what the checkpoint's form or the configuration says; else it
    has full attention and the last block's kind of MLP. Raises ValueError, with the target's name, for a target without
    attention.
    """
    config = copy.deepcopy(config)
    kinds = getattr(config, "layer_types", None)
    if kinds and not set(kinds) & ATTENTION:
        raise ValueError(f"{name} has no layer of attention alone, which an MTP head needs")
    attends = [kind for kind in kinds or () if kind in ATTENTION]
    default = "full_attention" if "full_attention" in attends else attends[-1] if attends else ""
    last_mlp = (getattr(config, "mlp_layer_types", None) or [""])[-1]
    for field_name, of_form, of_target in (
        ("layer_types", form and form.layer_kind, default),
        ("mlp_layer_types", form and form.mlp_kind, last_mlp),
    ):
        if getattr(config, field_name, None):
            of_heads = getattr(config, f"mtp_{field_name}", None)
            setattr(config, field_name, [of_form or (of_heads[0] if of_heads else of_target)])
    config.num_hidden_layers = 1
    if hasattr(config, "first_k_dense_replace"):
        config.first_k_dense_replace = 0  # as transformers' `get_mtp_config`: heads have experts
    config.tie_word_embeddings = False
    values = config.to_dict()
    for key in ("_name_or_path", "architectures", "dtype", "quantization_config", "transformers_version", "auto_map"):
        values.pop(key, None)
    if form and form.model_type:
        values["model_type"] = form.model_type
    return values


def to_drafter(heads: Sequence[Head], drafter: Any) -> dict[str, Tensor]:
    """Returns the drafter's weights from the checkpoint's tensors, of as many heads as the drafter has.

    Raises ValueError for one that is missing, unknown or of another shape, and for an embedding or LM head of its own.
    """
    state: dict[str, Tensor] = {}
    for head, module in zip(heads, drafter.heads, strict=True):
        prefix = f"later.{head.number - 1}." if head.number else ""
        state |= {prefix + name: tensor for name, tensor in _to_head(head, module).items()}
    return state


def from_drafter(heads: Sequence[Head], drafter: Any) -> dict[str, Tensor]:
    """Returns the checkpoint's tensors from the drafter's weights, in the dtypes that the checkpoint has.

    Raises ValueError if they are not the tensors that the checkpoint has, copies of the target's left out.
    """
    tensors: dict[str, Tensor] = {}
    for head, module in zip(heads, drafter.heads, strict=True):
        tensors |= _from_head(head, module)
    return tensors


def _to_head(head: Head, drafter: Any) -> dict[str, Tensor]:
    """Returns the weights of one of the drafter's heads."""
    tensors, target = head.read(), drafter.target
    _check_copies(head, tensors, target)
    own = {name: tensor for name, tensor in tensors.items() if not head.is_copy(name)}
    _check_tensors(own, _in_checkpoint(head, drafter, own.keys()), head, type(drafter.model).__name__)
    ordinary = {head.ordinary_name(name): tensor for name, tensor in own.items()}
    ordinary["projection.weight"] = _halves_swapped(head, ordinary["projection.weight"])
    config = copy.deepcopy(drafter.model.config)
    config.vocab_size = 1
    config.bos_token_id = config.eos_token_id = config.pad_token_id = None
    with _quiet():
        loaded = type(drafter.model).from_pretrained(
            None,
            config=config,
            state_dict={name: tensor for name, tensor in ordinary.items() if not name.startswith(OUTER)},
            dtype=target.dtype,
        )
    state = {f"model.{name}": tensor for name, tensor in loaded.state_dict().items()}
    expected = drafter.state_dict()
    return {name: tensor for name, tensor in (state | ordinary).items() if name in expected}


def _from_head(head: Head, drafter: Any) -> dict[str, Tensor]:
    """Returns the checkpoint's tensors of one of the drafter's heads."""
    before = {name: tensor for name, tensor in head.read().items() if not head.is_copy(name)}
    tensors = _in_checkpoint(head, drafter, before.keys())
    _check_tensors(before, tensors, head, type(drafter.model).__name__)
    return {name: tensor.to("cpu", before[name].dtype).contiguous() for name, tensor in tensors.items()}


def _in_checkpoint(head: Head, drafter: Any, names: Collection[str]) -> dict[str, Tensor]:
    """Returns the drafter's weights by their names in the checkpoint.

    Those of experts are one by one, as older checkpoints have them, unless `names` are of joined ones.
    """
    weights = drafter.state_dict()
    layer = {name.removeprefix("model."): tensor for name, tensor in weights.items() if name.startswith("model.")}
    outer = {name: weights[name] for name in weights if name.startswith(OUTER)}
    outer["projection.weight"] = _halves_swapped(head, outer["projection.weight"])
    joined = {head.checkpoint_name(name): tensor for name, tensor in (layer | outer).items()}
    if joined.keys() == set(names):
        return joined
    single = revert_weight_conversion(drafter.model, layer)
    return {head.checkpoint_name(name): tensor for name, tensor in (single | outer).items()}


def _halves_swapped(head: Head, projection_DE: Tensor) -> Tensor:
    """Returns a projection with the halves of its input, embedding and hidden state, swapped if the form swaps them."""
    if not head.form.is_hidden_first:
        return projection_DE
    return torch.cat(projection_DE.chunk(2, dim=1)[::-1], dim=1)


def _check_tensors(found: dict[str, Tensor], expected: dict[str, Tensor], head: Head, model: str) -> None:
    """Raises ValueError for tensors of the checkpoint that are missing, unknown or of another shape."""
    both = sorted(found.keys() & expected.keys())
    for fault, names in (
        ("missing", sorted(expected.keys() - found.keys())),
        ("unknown", sorted(found.keys() - expected.keys())),
        ("of another shape", [name for name in both if found[name].shape != expected[name].shape]),
    ):
        if names:
            more = f" and {len(names) - NUM_NAMED} more" if len(names) > NUM_NAMED else ""
            raise ValueError(
                f"{head.folder}: {', '.join(names[:NUM_NAMED])}{more} {'is' if len(names) == 1 else 'are'} {fault}: the"
                f" MTP head is read as a layer of {model}, as config.json describes it; download the target again, or"
                " train a head from nothing with ./launch.sh mtp"
            )


def _check_copies(head: Head, tensors: dict[str, Tensor], target: Any) -> None:
    """Raises ValueError unless copies are the target's, compared in bfloat16 as either may be stored in less."""
    own = {
        "embedding": target.model.get_input_embeddings().weight,
        "LM head": target.model.get_output_embeddings().weight,
    }
    for name, tensor in tensors.items():
        if not head.is_copy(name):
            continue
        what = head.form.copies[head._inner(name)]
        if tensor.shape != own[what].shape or not torch.equal(tensor.bfloat16(), own[what].detach().bfloat16().cpu()):
            raise ValueError(
                f"{head.folder}: {name} is not the target's {what}; MTP heads with one of their own are not supported"
            )


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences transformers' report of the embedding and LM head, which a head takes from its target."""
    level, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if has_bars:
            logging.enable_progress_bar()
