"""Views of a transformers decoder stack: the user's own modules, run over a span or without some sublayers.

A view is a shallow copy: it shares every parameter with the model, which stays unchanged.
"""

import contextlib
import copy
import inspect
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

LAYER_LISTS = ("layers", "h", "block", "blocks")
FINAL_NORMS = (
    "norm",
    "ln_f",
    "final_layer_norm",
    "final_layernorm",
    "norm_f",
    "final_norm",
    "embedding_norm",
    "layer_norm",
    "layernorm",
)
ATTENTIONS = ("self_attn", "attn", "attention", "self_attention")
MLPS = ("mlp", "fc2", "feed_forward", "block_sparse_moe", "shared_mlp", "ffn")


@dataclass(kw_only=True)
class Outputs:
    """What a model's blocks and their sublayers return: the length of a tuple, or 0 for a tensor alone."""

    block: int = 0
    sublayers: dict[tuple[str, int], int] = field(default_factory=dict)
    """By kind, "attention" or "mlp", and block."""


class ForwardContext(threading.local):
    """Inputs and outputs of one forward through a view besides the stack's own arguments; each thread has its own."""

    def __init__(self) -> None:
        self.begin(positions_BN=None)

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return ForwardContext, ()  # a copy begins empty, so that targets can be copied

    def begin(
        self,
        *,
        positions_BN: Tensor | None,
        key_positions: Callable[[], Tensor] | None = None,
        wanted: tuple[int, ...] = (),
        resume: Tensor | None = None,
    ) -> None:
        """Sets the positions of queries and keys, the hidden layers to record and the hidden states to resume from."""
        self.positions, self._key_positions, self.resume = positions_BN, key_positions, resume
        self.wanted, self.is_past_embedding = frozenset(wanted), False
        self.hidden: dict[int, Tensor] = {}

    def key_positions(self) -> Tensor:
        """Returns the positions [B, S] of the keys: of the cache's slots, or of the text that is read without one."""
        assert self._key_positions is not None
        return self._key_positions()

    def end(self) -> dict[int, Tensor]:
        """Returns the recorded hidden layers and drops all references to them."""
        hidden, self.hidden, self.resume, self._key_positions = self.hidden, {}, None, None
        return hidden


class Wrapper(nn.Module):
    """A module around another one, whose attributes it shows."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)


class _Layer(Wrapper):
    """One block of a view; outside the span it passes hidden states on unchanged."""

    def __init__(
        self, inner: nn.Module, context: ForwardContext, index: int, *, runs: bool, is_start: bool, tuple_length: int
    ) -> None:
        super().__init__(inner)
        self._context, self._index, self._runs, self._is_start = context, index, runs, is_start
        self._tuple_length = tuple_length

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self._index == 0:
            self._context.is_past_embedding = True
        if self._is_start and self._context.resume is not None:
            hidden = self._context.resume
        if self._index in self._context.wanted:
            # Gemma 3n hands on several copies [C, B, T, D], of which the first is the one that its blocks compute.
            self._context.hidden[self._index] = hidden if hidden.ndim == 3 else hidden[0]
        return self.inner(hidden, *args, **kwargs) if self._runs else _as_output(hidden, self._tuple_length)


class _FinalNorm(Wrapper):
    """Replaces the final norm, which a view leaves out; NanoChat norms embeddings by the same module."""

    def __init__(self, inner: nn.Module, context: ForwardContext) -> None:
        super().__init__(inner)
        self._context = context

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden if self._context.is_past_embedding else self.inner(hidden)


class _Zero(nn.Module):
    """Replaces a skipped sublayer: adds nothing to the residual stream."""

    def __init__(self, original: nn.Module, *, tuple_length: int, width: int) -> None:
        super().__init__()
        self._tuple_length, self._width = tuple_length, width
        self._adds_residual = list(inspect.signature(original.forward).parameters)[1:2] == ["residual"]

    def forward(
        self, hidden: Tensor | None = None, *others: Any, hidden_states: Tensor | None = None, **kwargs: Any
    ) -> Any:
        if self._adds_residual:  # BLOOM's and MPT's sublayers are handed the residual stream, and return the sum
            return _as_output(others[0] if others else kwargs["residual"], self._tuple_length)
        given = hidden if hidden is not None else hidden_states
        assert given is not None
        return _as_output(given.new_zeros(*given.shape[:-1], self._width), self._tuple_length)


def _as_output(hidden: Tensor, tuple_length: int) -> Any:
    """Returns hidden states as a block or sublayer does: alone, or first in a tuple of this length."""
    return (hidden, *[None] * (tuple_length - 1)) if tuple_length else hidden


class _Positions(nn.Module):
    """Embeddings of the context's positions, for decoders that derive positions from a single cache length.

    Positions that are computed, not looked up, are taken from a table of what the decoder's module returns for a text
    without a cache.
    """

    def __init__(self, inner: Any, context: ForwardContext) -> None:
        super().__init__()
        self.inner, self._context = inner, context
        self._parameters_of_call = inspect.signature(inner.forward)
        self._table_TD: Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        positions = self._context.positions
        if positions is None:
            return self.inner(*args, **kwargs)
        if isinstance(self.inner, nn.Embedding):
            return nn.functional.embedding(positions + getattr(self.inner, "offset", 0), self.inner.weight)
        longest = int(positions.max()) + 1
        if self._table_TD is None or len(self._table_TD) < longest:
            self._table_TD = self._table(2 * longest, positions.device, *args, **kwargs)
        return nn.functional.embedding(positions, self._table_TD)

    def _table(self, length: int, device: torch.device, *args: Any, **kwargs: Any) -> Tensor:
        """Returns the embeddings [T, D] of positions 0 to length - 1, by the arguments' names."""
        given = self._parameters_of_call.bind(*args, **kwargs).arguments
        position_1T = torch.arange(length, device=device)[None]
        unpadded = getattr(self.inner, "padding_idx", None) or 0
        values: dict[str, Any] = {
            "input_ids": torch.full((1, length), unpadded + 1, device=device),
            "input_ids_shape": torch.Size((1, length)),
            "past_key_values_length": 0,
            "position_ids": position_1T.T if "inputs_embeds" in given else position_1T,  # a column for Pegasus-X
        }
        for name, value in given.items():
            if isinstance(value, Tensor) and value.is_floating_point():
                values[name] = value.new_zeros(1, length, *value.shape[2:])
        table = self.inner(**{name: values[name] for name, value in given.items() if value is not None})
        return table.reshape(length, table.shape[-1])


class HiddenStateOutput(BaseModelOutputWithPast):
    """A model output that holds the last hidden state, and None for any other attribute that a head may read."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)


def unwrapped(model: Any) -> Any:
    """Returns the transformers model inside torch.compile, data parallelism or PEFT, whose adapters stay in its layers.

    Raises ValueError for anything but a model, and for PEFT methods that change a model's input.
    """
    if hasattr(model, "_orig_mod"):
        return unwrapped(model._orig_mod)
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return unwrapped(model.module)
    if hasattr(model, "get_base_model"):
        if model.active_peft_config.is_prompt_learning:
            kind = type(model.active_peft_config).__name__
            raise ValueError(f"{type(model).__name__} adds trained tokens to its input ({kind}), which is unsupported")
        return unwrapped(model.get_base_model())
    if not isinstance(model, nn.Module) or not hasattr(model, "config"):
        raise ValueError(f"{type(model).__name__} is not a transformers model; load one by Target.from_pretrained")
    return model


def shallow_copy(module: nn.Module) -> Any:
    """Returns a copy that shares parameters, buffers and children, and whose children can be replaced."""
    copied = copy.copy(module)
    copied.__dict__["_modules"] = dict(module._modules)
    copied.__dict__.pop("_compiled_call_impl", None)  # compiled in place, it would run the original's children
    if "_hf_hook" in copied.__dict__:  # a forward that accelerate has put before the module's own, which does the same
        for name in ("_hf_hook", "_old_forward", "forward"):
            copied.__dict__.pop(name, None)
    return copied


def replaced(module: nn.Module, new: dict[str, nn.Module]) -> Any:
    """Returns a copy that shares parameters, in which the modules at these names, "layers.0.mixer" say, are others."""
    copied, below = shallow_copy(module), dict[str, dict[str, nn.Module]]()
    for name, other in new.items():
        child, _, rest = name.partition(".")
        below.setdefault(child, {})[rest] = other
    for child, others in below.items():
        copied._modules[child] = others[""] if "" in others else replaced(module.get_submodule(child), others)
    return copied


def find_child(module: nn.Module, names: tuple[str, ...], what: str) -> str:
    """Returns which of `names` the module has as a child; raises ValueError naming the architecture if none."""
    for name in names:
        if isinstance(module._modules.get(name), nn.Module):
            return name
    raise ValueError(f"{type(module).__name__} has no {what} that draftsmith supports (looked for {', '.join(names)})")


def blocks_of(model: Any) -> nn.ModuleList:
    """Returns the blocks of a model's decoder; raises ValueError naming the architecture if they are not found."""
    decoder = model.get_decoder()
    return getattr(decoder, find_child(decoder, LAYER_LISTS, "list of blocks"))


@contextlib.contextmanager
def recorded_outputs(stack: nn.Module) -> Iterator[Outputs]:
    """Records, while a forward runs in its context, what the stack's blocks and sublayers return."""
    outputs, handles = Outputs(), []

    def record(module: nn.Module, key: tuple[str, int] | None) -> None:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            length = len(output) if isinstance(output, tuple | list) else 0
            if key is None:
                outputs.block = length
            else:
                outputs.sublayers[key] = length

        handles.append(module.register_forward_hook(hook))

    for index, block in enumerate(getattr(stack, find_child(stack, LAYER_LISTS, "list of blocks"))):
        record(block, None)
        for kind, names in (("attention", ATTENTIONS), ("mlp", MLPS)):
            found = (block._modules.get(name) for name in names)
            if (child := next((one for one in found if isinstance(one, nn.Module)), None)) is not None:
                record(child, (kind, index))
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def view(
    stack: nn.Module,
    context: ForwardContext,
    start: int,
    stop: int,
    skipped: frozenset[tuple[str, int]],
    *,
    width: int,
    outputs: Outputs,
) -> Any:
    """Returns a view that runs blocks `start` to `stop - 1` without the final norm.

    `skipped` holds ("attention", i) and ("mlp", i) for sublayers to skip; `width` is that of the residual stream. With
    `start` > 0 the context's `resume` replaces the embedding output. The context records hidden layer i as the input of
    block i. Raises ValueError for a sublayer that cannot be skipped.
    """
    copied = shallow_copy(stack)
    list_name, norm_name = find_child(stack, LAYER_LISTS, "list of blocks"), final_norm(stack)
    layers = []
    for index, layer in enumerate(getattr(stack, list_name)):
        kinds = {kind for kind, block in skipped if block == index}
        # A block without both sublayers is not run at all: its norms would be computed for nothing.
        runs = start <= index < stop and kinds < {"attention", "mlp"}
        inner = _without(layer, index, kinds, width, outputs) if runs else layer
        is_start, tuple_length = index == start, outputs.block
        layers.append(_Layer(inner, context, index, runs=runs, is_start=is_start, tuple_length=tuple_length))
    copied._modules[list_name] = nn.ModuleList(layers)
    if norm_name is not None:
        copied._modules[norm_name] = _FinalNorm(getattr(stack, norm_name), context)
    if isinstance(getattr(stack, "embed_positions", None), nn.Module):
        copied._modules["embed_positions"] = _Positions(stack.embed_positions, context)
    return copied


def final_norm(stack: nn.Module) -> str | None:
    """Returns the name of the stack's final norm; None for decoders of post-norm blocks, which have none."""
    return next((name for name in FINAL_NORMS if isinstance(stack._modules.get(name), nn.Module)), None)


def _without(layer: nn.Module, index: int, kinds: set[str], width: int, outputs: Outputs) -> nn.Module:
    if not kinds:
        return layer
    if "_hf_hook" in layer.__dict__:
        raise ValueError(f"{type(layer).__name__} is spread over devices by device_map, so no sublayer can be skipped")
    if getattr(layer, "do_layer_norm_before", True) is False:
        raise ValueError(f"{type(layer).__name__} normalises after its sublayers, so none can be skipped")
    copied = shallow_copy(layer)
    for kind, names, what in (("attention", ATTENTIONS, "attention"), ("mlp", MLPS, "MLP")):
        if kind in kinds:
            name = find_child(layer, names, what)
            if isinstance(layer._modules[name], nn.ModuleList):
                raise ValueError(f"{type(layer).__name__} has several sublayers of a kind, so none can be skipped")
            tuple_length = outputs.sublayers.get((kind, index), 0)
            copied._modules[name] = _Zero(layer.get_submodule(name), tuple_length=tuple_length, width=width)
    return copied
