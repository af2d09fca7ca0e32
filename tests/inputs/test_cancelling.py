"""Tests of the search for the numbers of rows with which matrix products give a row the same bits.

Shape suffixes: M rows, I and O a matrix's input and output widths.
"""

from functools import reduce

import pytest
import torch
from torch import Tensor, nn

from draftsmith.inputs.invariance import cancelling
from draftsmith.inputs.invariance.cancelling import equal_row_counts


@pytest.fixture
def other_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets products of fewer than three rows, or of more than 200, add from the last input to the first."""

    def linear(rows_MI: Tensor, weight_OI: Tensor, bias: Tensor | None) -> Tensor:
        step = -1 if 3 <= rows_MI.shape[-2] <= 200 else 1
        products_MOI = rows_MI[..., None, :] * weight_OI
        return reduce(torch.add, products_MOI.unbind(-1)[::step]).to(torch.bfloat16)

    monkeypatch.setattr(cancelling, "linear", linear)


def model(name: str) -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({name: nn.Linear(16, 8)})


def test_rows_are_limited_to_those_of_one_order(other_order: None) -> None:
    assert equal_row_counts(model("projection")) == (3, 128)


def test_counts_do_not_depend_on_the_weights() -> None:
    # Sums of 16 to 64 bfloat16 products hide, with many a weight matrix, that a kernel adds in another order.
    for width, num_outputs in ((32, 32), (32, 16), (64, 32)):
        counts = set()
        for seed in range(6):
            torch.manual_seed(seed)
            counts.add(equal_row_counts(nn.Linear(width, num_outputs, bias=False).to(torch.bfloat16)))
        assert len(counts) == 1


def test_ordinary_rows_would_show_no_other_order(other_order: None) -> None:
    weight_OI, rows_MI = model("projection")["projection"].weight, torch.randn(2, 16)
    few, many = cancelling.linear(rows_MI, weight_OI, None), cancelling.linear(rows_MI.repeat(2, 1), weight_OI, None)
    assert few.equal(many[:2])


def test_experts_must_have_one_order_from_one_row_on(other_order: None) -> None:
    assert equal_row_counts(model("experts")) is None
