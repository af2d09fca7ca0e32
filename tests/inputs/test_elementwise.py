"""Tests of the search for the numbers of rows of which activation functions give a row the same bits.

Shape suffixes: M rows, I their width.
"""

import pytest
import torch
from torch import Tensor, nn

from draftsmith import Target
from draftsmith.inputs.invariance import elementwise
from draftsmith.inputs.invariance.elementwise import equal_row_multiple
from draftsmith.inputs.invariance.self_test import find_shapes
from tests.support.models import tiny_model

WIDTHS = {64: 1, 48: 2, 24: 4, 36: 8, 33: 32}
"""The least number of rows of each width that fill whole vectors of 32."""


class InVectors(nn.Module):
    """Computes elements in vectors of `size`, and those left over by a formula that rounds in another way."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, rows_MI: Tensor) -> Tensor:
        flat = rows_MI.flatten()
        whole = len(flat) // self.size * self.size
        # The sums differ by rounding, where numbers are not too small beside one.
        return torch.cat([(flat[:whole] + 1) - 1, flat[whole:]]).view_as(rows_MI)


def multiple_of(
    function: nn.Module, name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> int | None:
    model = nn.ModuleDict({name: function})
    return equal_row_multiple(model, lambda: model[name](torch.zeros(shape, dtype=dtype)), 512)


@pytest.fixture
def vectors_are_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elementwise, "MODULES", (__name__,))


@pytest.mark.parametrize(
    ("width", "expected", "dtype"),
    [
        *((width, expected, torch.float32) for width, expected in WIDTHS.items()),
        (33, 32, torch.bfloat16),
        *(pytest.param(width, WIDTHS[width], torch.bfloat16, marks=pytest.mark.slow) for width in (64, 48, 24, 36)),
    ],
    ids=str,
)
def test_multiple_fills_whole_vectors(
    width: int, expected: int, dtype: torch.dtype, vectors_are_activations: None
) -> None:
    assert multiple_of(InVectors(32), "activation", (1, 1, width), dtype) == expected


def test_no_multiple_fills_vectors_of_a_prime_number(vectors_are_activations: None) -> None:
    assert multiple_of(InVectors(31), "activation", (1, 1, 48)) is None


def test_experts_see_any_number_of_rows(vectors_are_activations: None) -> None:
    assert multiple_of(InVectors(32), "expert", (1, 64)) == 1
    assert multiple_of(InVectors(32), "expert", (1, 48)) is None


def test_functions_without_rounding_need_no_padding() -> None:
    assert multiple_of(nn.ReLU(), "activation", (1, 1, 33)) == 1


def test_shapes_hold_the_multiple(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elementwise, "MODULES", (__name__,))
    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.mlp.act_fn = InVectors(64)  # rows are 48 wide
    assert find_shapes(Target(model)).node_multiple == 4


def test_bits_of_an_activation_are_those_of_whole_forwards() -> None:
    """Each real function, at the multiple found for it, gives a row alone the bits it has among others."""
    for function in (nn.SiLU(), nn.GELU(), nn.GELU(approximate="tanh")):
        multiple = multiple_of(function, "activation", (1, 1, 24))
        assert multiple is not None
        rows_MI = torch.randn(4096, 24)
        among_MI = function(rows_MI)
        for first in range(0, 4096, multiple):
            assert function(rows_MI[first : first + multiple]).equal(among_MI[first : first + multiple])
