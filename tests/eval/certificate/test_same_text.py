"""Tests of the comparison of ids and bits with plain decoding's."""

from functools import partial

import pytest
import torch

from draftsmith import decoding
from draftsmith.core.fixed_shapes.forwards import Shapes
from draftsmith.drafters import lm
from draftsmith.verify.research.position_noise import PositionNoise
from eval.certificate.same_text import DecodedText, count_differences, decode
from tests.drafters.test_batch_invariant import invariant_target
from tests.support.models import prompts

NUM_NEW = 20


def compared(temperature: float) -> dict[str, float]:
    target = invariant_target("llama", torch.float32)
    options = {"temperature": temperature, "seeds": (3, 4, 5), "max_new_tokens": NUM_NEW}
    run = partial(decode, target, prompts=prompts(3), **options)
    copy = lm.Drafter(lm.Config(model=target.model.config.to_dict(), length="fixed", num_draft=3), target)
    copy.model.load_state_dict(target.model.state_dict())
    plain, drafted = run(None), run(copy)
    assert all(len(hashes) >= NUM_NEW - 4 for hashes in plain.hashes + drafted.hashes)  # without the last round
    return count_differences(plain, drafted)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_drafting_changes_no_bits(temperature: float) -> None:
    found = compared(temperature)
    assert found["tau"] > 1 and (found["different_ids"], found["different_bits"]) == (0, 0)


def test_bits_differ_where_padding_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "shapes_for", lambda *_: Shapes())
    assert compared(0.0)["different_bits"] > 0


def test_ids_differ_where_noise_is_drawn_in_order_of_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)

    def scores(self: PositionNoise, probs_XFV: torch.Tensor, *_: object) -> torch.Tensor:
        return probs_XFV / torch.empty(len(probs_XFV), 1, probs_XFV.shape[-1]).exponential_(generator=generator)

    monkeypatch.setattr(PositionNoise, "scores", scores)
    assert compared(1.0)["different_ids"] > 0


def test_count_differences_counts_rows() -> None:
    plain = DecodedText(rows=[[1, 2], [3, 4]], hashes=[["a"], ["b"]], steps=4)
    drafted = DecodedText(rows=[[1, 2], [3, 5]], hashes=[["a", "x"], ["b", "x"]], steps=2)
    expected = {"num_rows": 2, "different_ids": 1, "different_bits": 0, "tau": 2.0}
    assert count_differences(plain, drafted) == expected
    other = DecodedText(rows=[[1, 2], [3, 4]], hashes=[["a"], ["c"]], steps=2)
    assert count_differences(plain, other)["different_bits"] == 1
