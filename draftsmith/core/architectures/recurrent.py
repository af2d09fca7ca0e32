"""Layers that keep one state instead of every token's keys and values: linear attention, state spaces, convolutions.

After a verified draft their state must be the one after the accepted tokens, which a forward of the whole draft has
passed over. So states are kept between forwards, and the inputs of each such module since the last commit. Where the
state after the accepted tokens was not kept, the next forward feeds the module their inputs again before its own; rows
that accepted different numbers get their states by a forward of the module alone. Attention, MLPs and experts are not
run again.

Shape suffixes: B rows, T tokens since the oldest kept state, N new tokens, R tokens fed again, D width of the module's
input.
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, LinearAttentionLayer

from draftsmith.core.views import Wrapper, replaced

State = dict[tuple[str, int], Tensor]
"""A module's tensors, rows first, by kind ("conv" or "recurrent") and number; empty before the first token."""
Run = Callable[[Tensor, State], tuple[Any, list[State]]]
"""Runs a module over inputs [B, N, D] from a state; returns its output, and the states after equal parts of them."""


MAX_FED_AGAIN = 16
"""Most tokens that are fed again with new ones. Kernels work in chunks of 64: fewer cost about as much as one."""


class RecurrentState:
    """The states of one module in one cache: after the committed tokens, and after those fed since."""

    def __init__(self, num_rows: int) -> None:
        self._kept: dict[int, State] = {0: {}}  # all rows' states, by number of the stored inputs
        self._inputs_BTD: Tensor | None = None
        self._num_committed = [0] * num_rows  # of each row's stored inputs
        self._run: Run | None = None

    def begin(self, first: int) -> tuple[State, Tensor | None]:
        """Returns a state and the inputs [B, R, D] to feed again from there, to get to `first` tokens past the commit.

        What was fed after those is forgotten.
        """
        counts = [number + first for number in self._num_committed]
        origin = max(kept for kept in self._kept if kept <= min(counts))
        if first == 0 and len(set(counts)) == 1 and 0 < counts[0] - origin <= MAX_FED_AGAIN:
            again_BRD = self._stored()[:, origin : counts[0]]
            self._kept, self._inputs_BTD = {0: self._kept[origin]}, None
            self._num_committed = [again_BRD.shape[1]] * len(counts)
            return self._kept[0], again_BRD
        return self._state_at(first, counts), None

    def _state_at(self, first: int, counts: list[int]) -> State:
        """Returns the state after this many stored inputs, `first` of them uncommitted, and forgets later ones."""
        state = self._after(counts)
        if first == 0:
            self._kept, self._inputs_BTD, self._num_committed = {0: state}, None, [0] * len(counts)
        elif len(set(counts)) == 1:
            self._kept = {count: kept for count, kept in self._kept.items() if count <= counts[0]} | {counts[0]: state}
            self._inputs_BTD = self._stored()[:, : counts[0]]
        else:
            index_BT = torch.tensor(self._num_committed)[:, None] + torch.arange(first)
            inputs_BTD = self._stored()
            rows_B1 = torch.arange(len(counts))[:, None]
            self._kept = {0: self._after(self._num_committed), first: state}
            self._inputs_BTD, self._num_committed = inputs_BTD[rows_B1, index_BT], [0] * len(counts)
        return state

    def extend(self, inputs_BND: Tensor, states: list[State], run: Run) -> None:
        """Adds a forward's inputs, and the states after each equal part of them."""
        before = 0 if self._inputs_BTD is None else self._inputs_BTD.shape[1]
        num_each = inputs_BND.shape[1] // len(states)
        self._kept |= {before + num_each * number: state for number, state in enumerate(states, start=1)}
        self._inputs_BTD = torch.cat([self._stored(), inputs_BND], dim=1) if before else inputs_BND
        self._run = run

    def commit(self, counts: list[int]) -> None:
        """Commits this many more tokens of each row; its state is computed when it is next needed."""
        self._num_committed = [before + count for before, count in zip(self._num_committed, counts, strict=True)]

    def change_rows(self, origins: list[int | None], added: "RecurrentState | None") -> None:
        """Makes row i what row `origins[i]` was, or for None the next row of `added`."""
        num_old, num_new = len(self._num_committed), origins.count(None)
        old, new = list(range(num_old)), list(range(num_old, num_old + num_new))
        added_state = added._state_at(0, added._num_committed) if added is not None else {}
        joined = _joined([(old, self._state_at(0, self._num_committed)), (new, added_state)], num_old + num_new)
        next_new = iter(new)
        rows = [next(next_new) if origin is None else origin for origin in origins]
        self._kept, self._num_committed = {0: _rows_of(joined, rows)}, [0] * len(origins)

    def _stored(self) -> Tensor:
        assert self._inputs_BTD is not None, "nothing was fed to this module since the last commit"
        return self._inputs_BTD

    def _after(self, counts: list[int]) -> State:
        """Returns the state after this many of each row's stored inputs; rows of equal counts are run together."""
        if len(set(counts)) == 1 and counts[0] in self._kept:
            return self._kept[counts[0]]
        parts = []
        for count in sorted(set(counts)):
            rows = [row for row, its_count in enumerate(counts) if its_count == count]
            origin = max(kept for kept in self._kept if kept <= count)
            state = _rows_of(self._kept[origin], rows)
            if origin < count:
                assert self._run is not None
                state = self._run(self._stored()[rows, origin:count], state)[1][-1]
            parts.append((rows, state))
        return _joined(parts, len(counts))


def _rows_of(state: State, rows: list[int]) -> State:
    return {key: tensor[rows] for key, tensor in state.items()}


def _joined(parts: list[tuple[list[int], State]], num_rows: int) -> State:
    """Returns the state of all rows; rows before their first token get zeros, as which every module reads no state."""
    joined: State = {}
    for rows, state in parts:
        for key, tensor in state.items():
            if key not in joined:
                joined[key] = tensor.new_zeros(num_rows, *tensor.shape[1:])
            joined[key][rows] = tensor
    return joined


class _OwnState(Cache):
    """The cache that a recurrent module sees: a copy of its own state, in transformers' own kind of layer."""

    def __init__(self, state: State, layer_index: int, num_states: int) -> None:
        layer = LinearAttentionLayer(number_of_states=num_states)
        for (kind, number), tensor in state.items():
            # Modules change their state in place.
            getattr(layer, f"{kind}_states")[number] = tensor.clone()
            getattr(layer, f"is_{kind}_states_initialized")[number] = True
            layer.has_previous_state[number] = True
            layer.dtype, layer.device = tensor.dtype, tensor.device
            if kind == "conv":
                layer.conv_kernel_size[number] = tensor.shape[-1]
        super().__init__(layers=[layer] * (layer_index + 1))

    def state(self) -> State:
        layer = self.layers[-1]
        kinds = (("conv", layer.conv_states), ("recurrent", layer.recurrent_states))
        return {(kind, number): tensor for kind, by in kinds for number, tensor in by.items() if tensor is not None}


_INPUTS, _STATE = object(), object()
"""Stand for a module's inputs and its cache among its arguments."""


class RecurrentModule(Wrapper):
    """A module whose states between forwards are kept in the target's cache."""

    def __init__(self, inner: nn.Module, name: str, layer_index: int, num_states: int) -> None:
        super().__init__(inner)
        self._name, self._layer_index, self._num_states = name, layer_index, num_states
        self._ignores_state: bool | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        cache = next((value for value in (*args, *kwargs.values()) if isinstance(value, Cache)), None)
        if cache is None:
            return self.inner(*args, **kwargs)
        inputs_BND = args[0] if args else kwargs["hidden_states"]
        stand_ins = {id(inputs_BND): _INPUTS, id(cache): _STATE}
        other_args = [stand_ins.get(id(value), value) for value in args]
        other_kwargs = {name: stand_ins.get(id(value), value) for name, value in kwargs.items()}

        def run_once(inputs_BND: Tensor, state: State) -> tuple[Any, State]:
            own = _OwnState(state, self._layer_index, self._num_states)
            given = {id(_INPUTS): inputs_BND, id(_STATE): own}
            named = {name: given.get(id(value), value) for name, value in other_kwargs.items()}
            return self.inner(*(given.get(id(value), value) for value in other_args), **named), own.state()

        run = partial(self._run, run_once)
        if self._name not in cache.recurrent:
            cache.recurrent[self._name] = RecurrentState(len(cache.lengths))
        held: RecurrentState = cache.recurrent[self._name]
        state, again_BRD = held.begin(cache.first)
        if again_BRD is not None:
            inputs_BND = torch.cat([again_BRD, inputs_BND], dim=1)
        output, states = run(inputs_BND, state)
        held.extend(inputs_BND, states, run)
        return output if again_BRD is None else _without_first(output, again_BRD.shape[1])

    def _run(self, run_once: Callable[..., Any], inputs_BND: Tensor, state: State) -> tuple[Any, list[State]]:
        """Runs the module over its inputs, in one call if that reads the state; returns the states in between."""
        if inputs_BND.shape[1] == 1 or not state or not self._is_ignored(run_once, inputs_BND, state):
            output, state = run_once(inputs_BND, state)
            return output, [state]
        outputs, states = [], []
        for inputs_B1D in inputs_BND.split(1, dim=1):
            output, state = run_once(inputs_B1D, state)
            outputs.append(output)
            states.append(state)
        return _concatenated(outputs), states

    def _is_ignored(self, run_once: Callable[..., Any], inputs_BND: Tensor, state: State) -> bool:
        """Returns whether a call with several tokens ignores a part of the state; it is found out once.

        transformers 5.23 scans from an empty state in Mamba 1, Falcon-Mamba, Jamba and Zamba
        (findings/transformers-mamba-cached-chunk.sh).
        """
        if self._ignores_state is None:
            expected = _first_tensor(run_once(inputs_BND, state)[0])
            self._ignores_state = any(
                bool(tensor.any()) and _first_tensor(run_once(inputs_BND, state | {key: -tensor})[0]).equal(expected)
                for key, tensor in state.items()
            )
        return self._ignores_state


def _first_tensor(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def _concatenated(outputs: list[Any]) -> Any:
    """Returns outputs of single tokens as one: a tensor [B, N, ...], or a tuple of such."""
    if isinstance(outputs[0], Tensor):
        return torch.cat(outputs, dim=1)
    return tuple(None if parts[0] is None else torch.cat(parts, dim=1) for parts in zip(*outputs, strict=True))


def _without_first(output: Any, number: int) -> Any:
    """Returns an output of several tokens, a tensor [B, N, ...] or a tuple of such, without those of the first ones."""
    if isinstance(output, Tensor):
        return output[:, number:]
    return tuple(None if part is None else part[:, number:] for part in output)


class _Recorder(DynamicCache):
    """A cache that notes which module reads or writes recurrent state."""

    def __init__(self, config: Any, active: list[str]) -> None:
        super().__init__(config=config)
        self._active = active
        self.found: dict[str, int] = {}
        """The index of the layer, by the module's name."""

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0  # transformers' own fails on models without attention

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return query_length, 0

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        self.found[self._active[-1]] = layer_idx
        return super().get_conv_state(layer_idx, state_idx)

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        self.found[self._active[-1]] = layer_idx
        return super().get_recurrent_state(layer_idx, state_idx)


@torch.inference_mode()
def find_recurrent_modules(model: Any, config: Any, ids_BT: Tensor) -> dict[str, int]:
    """Returns the names of the modules that keep recurrent state, with the index of their layer.

    They are those inside which a forward of the model asks a cache for it. Raises ValueError if the forward fails.
    """
    active: list[str] = []
    recorder, handles = _Recorder(config, active), []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda _module, _inputs, name=name: active.append(name)))
        handles.append(module.register_forward_hook(lambda _module, _inputs, _output: active.pop() and None))
    try:
        model(input_ids=ids_BT.to(model.device), use_cache=True, **{cache_argument(model): recorder})
    except Exception as error:  # whatever a model raises
        reason = str(error).split("\n")[0]
        raise ValueError(f"{type(model).__name__} fails in its own forward with a cache ({reason})") from error
    finally:
        for handle in handles:
            handle.remove()
    return recorder.found


def with_recurrent_modules(root: Any, model: Any, found: dict[str, int], config: Any) -> Any:
    """Returns a copy of `root`, the model or a part of it, whose recurrent modules are wrapped; weights are shared."""
    modules = dict(model.named_modules())
    layers = {id(modules[name]): layer for name, layer in found.items()}
    num_states = getattr(config, "number_of_conv_states", 1)
    wrapped: dict[str, nn.Module] = {
        path: RecurrentModule(module, path, layers[id(module)], num_states)
        for path, module in root.named_modules(remove_duplicate=False)
        if id(module) in layers
    }
    return replaced(root, wrapped)


def cache_argument(model: Any) -> str:
    """Returns the name of a model's argument for its cache: state space models have another one."""
    return "cache_params" if "cache_params" in inspect.signature(model.forward).parameters else "past_key_values"
