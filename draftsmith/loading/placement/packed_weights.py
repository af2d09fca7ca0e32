"""Linear layers whose weights lie as the processor's matrix products read them.

torch's products of few rows on a CPU (by oneDNN and MKL) rearrange the whole matrix of weights, as a model stores it,
at every call. Here it is rearranged once. On two cores of an AMD EPYC all matrices of SmolLM2 in bfloat16 take 15 ms
for one token and 21 for 16, in place of 22 and 37.

Shape suffixes: B rows, T positions, I and O a layer's input and output widths.
"""

import platform
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

FEWEST_ELEMENTS = 2**16
"""Smaller matrices are multiplied as fast from where they lie (one thread of an EPYC)."""
MOST_BYTES = 2**31
"""Models whose weights take more are packed only on request, as the packed weights are copies."""
ROWS_PACKED_FOR = 16
"""The number of rows that oneDNN is told of when it chooses a layout; others may be multiplied by it."""


def pack(weight_OI: Tensor) -> Any:
    """Returns a copy of the weight in a layout of oneDNN's, which only `packed_linear` can read."""
    return torch.ops.mkldnn._reorder_linear_weight(weight_OI, ROWS_PACKED_FOR)


def packed_linear(input_BTI: Tensor, packed: Any, bias_O: Tensor | None) -> Tensor:
    """Returns the product [B, T, O] with a packed weight, and the bias added."""
    return torch.ops.mkldnn._linear_pointwise(input_BTI, packed, bias_O, "none", [], "")


class Packing(threading.local):
    """Whether the layers of one target use their packed weights; each thread has its own."""

    def __init__(self) -> None:
        self.is_on = True

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return Packing, ()  # a copy begins switched on, so that targets can be copied

    @contextmanager
    def switched(self, *, on: bool) -> Iterator[None]:
        """Within this context the layers use their packed weights, or those of the model."""
        before, self.is_on = self.is_on, on
        try:
            yield
        finally:
            self.is_on = before


class _PackedWeight:
    """The packed form of a weight [O, I], and the state of the weight that it was made from; a copy begins empty."""

    def __init__(self) -> None:
        self.made: tuple[weakref.ref[Tensor], tuple[int, int], Any] | None = None
        """The weight, its address and version, and its packed form; replaced as one, as threads share it."""

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return _PackedWeight, ()

    def get(self, weight_OI: Tensor) -> Any:
        """Returns the packed form, made anew if the weight was replaced or changed; None if it cannot be packed."""
        made, state = self.made, (weight_OI.data_ptr(), weight_OI._version)
        if made is None or made[0]() is not weight_OI or made[1] != state:
            packed = pack(weight_OI.detach()) if _is_packable(weight_OI) else None
            self.made = made = (weakref.ref(weight_OI), state, packed)
        return made[2]


class PackedLinear(nn.Linear):
    """A linear layer that takes another one's place, of which it shares everything, and multiplies by a packed weight.

    A frozen weight is packed at the first product in inference mode, as `generate` runs it, and again after changes
    that torch counts, as `load_state_dict` makes them, but not after those written through `weight.data`. A weight that
    needs a gradient is not packed, and what was packed of it is dropped: fused optimisers do not count what they write.
    """

    def __init__(self, layer: nn.Linear, packing: Packing) -> None:
        self.__dict__.update(layer.__dict__)
        self._packing, self._packed_weight = packing, _PackedWeight()

    @property
    def is_frozen(self) -> bool:
        """Whether its weight needs no gradient, so that decoding packs it."""
        return not self.weight.requires_grad

    def forward(self, input: Tensor) -> Tensor:
        """Returns what the layer returns, up to rounding."""
        weight = self.weight
        if not self.is_frozen:
            self._packed_weight = _PackedWeight()
        elif (
            self._packing.is_on
            and _takes_packed(input, weight)
            and (packed := self._packed_weight.get(weight)) is not None
        ):
            return packed_linear(input, packed, self.bias)
        return linear(input, weight, self.bias)


class _PackedView(PackedLinear):
    """A packed layer of a target's view of a model, which stays as it is: it stands for the model's layer."""

    def __init__(self, place: dict[str, nn.Module | None], name: str, packing: Packing) -> None:
        layer = place[name]
        assert isinstance(layer, nn.Linear)
        super().__init__(layer, packing)
        # The layer is looked up at each call, as another one, a quantised one say, may take its place.
        self._place, self._name, self._layer = place, name, (layer,)

    def forward(self, input: Tensor) -> Tensor:
        if (current := self._place[self._name]) is not self._layer[0]:
            assert current is not None
            return current(input)
        return super().forward(input)


def fixed_product(
    weight_OI: Tensor, bias_O: Tensor | None = None, *, request: bool | None = None
) -> Callable[[Tensor], Tensor]:
    """Returns the product with a weight that nothing will change, as a linear layer computes it.

    In inference mode it is one with a packed copy, under the conditions of `packed_layers`.
    """
    if not (_is_supported() and _has_packable_form(weight_OI) and _is_wanted(request, weight_OI.nbytes)):
        return lambda input: linear(input, weight_OI, bias_O)
    packed: list[Any] = []

    def product(input: Tensor) -> Tensor:
        if not _takes_packed(input, weight_OI):
            return linear(input, weight_OI, bias_O)
        if not packed:
            packed.append(pack(weight_OI.detach()))
        return packed_linear(input, packed[0], bias_O)

    return product


def _takes_packed(input: Tensor, weight: Tensor) -> bool:
    return (
        torch.is_inference_mode_enabled()
        and input.dtype == weight.dtype
        and input.device == weight.device
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


def packed_layers(module: nn.Module, packing: Packing, *, request: bool | None) -> dict[str, nn.Module]:
    """Returns layers to put in the place of a module's linear layers in a view of it, by name.

    With `request` None there are none if the weights take more than `MOST_BYTES`, with False none in any case. Layers
    stay as they are on other devices than the CPU, in other dtypes than float32 and bfloat16, inside modules whose
    forward was replaced or compiled, and inside adapters, which merge weights in a way that torch does not count.
    """
    found = _found(module, request, leave=())
    return {full_name: _PackedView(place, name, packing) for full_name, (place, name) in found.items()}


def pack_layers(module: nn.Module, *, request: bool | None) -> None:
    """Makes a drafter's own linear layers multiply by packed weights, under the conditions of `packed_layers`.

    A transformers model that the drafter contains is left: the `Target` that runs it packs what it runs.
    """
    for place, name in _found(module, request, leave=PreTrainedModel).values():
        place[name] = PackedLinear(place[name], Packing())


def _found(module: nn.Module, request: bool | None, *, leave: type | tuple[type, ...]) -> dict[str, tuple[Any, str]]:
    if request is False or not _is_supported():
        return {}
    found = dict(_packable(module, "", leave))
    return found if _is_wanted(request, sum(place[name].weight.nbytes for place, name in found.values())) else {}


def _packable(module: nn.Module, prefix: str, leave: type | tuple[type, ...]) -> Iterator[tuple[str, tuple[Any, str]]]:
    """Yields the full name of each layer to pack, and where it stands: a module's children, and its name among them.

    Modules of the types in `leave` are left out.
    """
    # A compiled module would run the original's children.
    if "forward" in module.__dict__ or module._compiled_call_impl or hasattr(module, "base_layer"):
        return
    for name, child in module._modules.items():
        if type(child) is nn.Linear and "forward" not in child.__dict__ and _is_packable(child.weight):
            yield prefix + name, (module._modules, name)
        elif child is not None and not isinstance(child, leave):
            yield from _packable(child, f"{prefix}{name}.", leave)


def _is_packable(weight: Tensor) -> bool:
    return (
        type(weight) in (Tensor, nn.Parameter)
        and _has_packable_form(weight)
        and not weight.is_inference()  # torch does not count changes of these
    )


def _is_wanted(request: bool | None, num_bytes: int) -> bool:
    return num_bytes <= MOST_BYTES if request is None else request


def _has_packable_form(weight: Tensor) -> bool:
    return (
        weight.device.type == "cpu"
        and (weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and _has_bfloat16()))
        and weight.numel() >= FEWEST_ELEMENTS
    )


def _has_bfloat16() -> bool:
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _is_supported() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64") and hasattr(torch.ops.mkldnn, "_linear_pointwise")
