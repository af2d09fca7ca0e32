"""The noise of positions: Philox against published vectors, its distribution, its independence, and what is kept."""

import pytest
import torch
from torch import Tensor

from draftsmith.verify.research.position_noise import PositionNoise, exponentials, of_words, philox
from eval.certificate.chi_square import p_value

LEAST_P_VALUE = 1e-4
"""Seeds are fixed, so that these tests either always pass or never."""
ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]
"""Counter, key and output of "philox4x32 10" in Random123's tests/kat_vectors."""
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize("device", DEVICES)
def test_philox_gives_the_known_answers(device: str) -> None:
    counters, keys, answers = (
        torch.tensor([words(text) for text in texts], device=device).T for texts in zip(*ANSWERS, strict=True)
    )
    assert philox(counters[..., None], keys[..., None])[..., 0].tolist() == answers.tolist()


def test_variables_are_those_of_their_counters() -> None:
    """Token 5 is word 1 of the group of tokens 4 to 7."""
    (row_V,) = exponentials([(0xA4093822 | 0x299F31D0 << 32, 3)], [11], 10)
    counter, key = torch.tensor([[1], [11], [3], [0]]), torch.tensor([[0xA4093822], [0x299F31D0]])
    word = philox(counter[..., None], key[..., None])[1, 0, 0]
    assert row_V[5].item() == pytest.approx(-torch.log((word.double() + 0.5) / 2**32).item(), rel=1e-6)


def test_variables_are_finite_and_positive_for_the_smallest_and_largest_words() -> None:
    low, high = of_words(torch.tensor([2**32 - 1, 0])).float().tolist()
    assert low == pytest.approx(2.0**-33, rel=1e-6)
    assert high == pytest.approx(22.87, abs=0.01)


@pytest.mark.parametrize("device", DEVICES)
def test_any_position_can_be_computed_alone(device: str) -> None:
    """The bits do not depend on what else is computed, on the size of the vocabulary, or on the device."""
    rows, positions = [(7, 0), (7, 1), (-1, 0), (2**63, 0)], [5, 0, 900, 2**31]
    together = exponentials(rows, positions, 4_098, device).cpu()
    for row, position, variables_V in zip(rows, positions, together, strict=True):
        for vocab_size in (1, 4_098):
            alone = exponentials([row], [position], vocab_size)
            assert torch.equal(alone[0], variables_V[:vocab_size])


def uniforms(seed: int, index: int, position: int, size: int) -> Tensor:
    return (-exponentials([(seed, index)], [position], size)[0]).exp()


def test_variables_follow_the_exponential_distribution() -> None:
    counts = torch.histc(uniforms(0, 0, 0, 100_000), bins=50, min=0, max=1)
    statistic = float(((counts - 2_000) ** 2 / 2_000).sum())
    assert p_value(statistic, 49) > LEAST_P_VALUE


@pytest.mark.parametrize(
    "other", [(1, 0, 0), (2**32, 0, 0), (0, 1, 0), (0, 0, 1), (0, 7, 7), "next token", "next group of tokens"]
)
def test_rows_positions_and_tokens_are_independent(other: tuple[int, int, int] | str) -> None:
    """Counts of pairs in 10 x 10 cells, against independence."""
    size = 100_000
    ours = uniforms(0, 0, 0, size + 4)
    shift = {"next token": 1, "next group of tokens": 4}
    theirs = ours[shift[other] :][:size] if isinstance(other, str) else uniforms(*other, size)
    cells = (ours[:size] * 10).long().clamp(max=9) * 10 + (theirs * 10).long().clamp(max=9)
    counts = torch.bincount(cells, minlength=100).double()
    # Overlapping pairs of neighbours are not independent of each other: every second or eighth pair is.
    if isinstance(other, str):
        counts = torch.bincount(cells.view(-1, 8)[:, 0], minlength=100).double()
    expected = counts.sum() / 100
    assert p_value(float(((counts - expected) ** 2 / expected).sum()), 99) > LEAST_P_VALUE


def picks(probs_V: Tensor, count: int, num_positions: int) -> Tensor:
    """Returns the tokens [positions, count] of the largest scores at as many positions of one row."""
    noise = PositionNoise([(3, 0)] * num_positions, [[0] * at for at in range(num_positions)])
    probs_XFV = probs_V.expand(num_positions, 1, -1)
    return noise.scores(probs_XFV, [0] * num_positions, range(num_positions)).topk(count).indices[:, 0]


def test_largest_scores_are_draws_without_replacement() -> None:
    probs_V, num_positions = torch.tensor([0.5, 0.0, 0.3, 0.15, 0.05]), 5_000
    pairs = picks(probs_V, 2, num_positions)
    assert not (pairs == 1).any(), "a token of probability 0 was picked"
    cells = [(first, second) for first in (0, 2, 3, 4) for second in (0, 2, 3, 4) if first != second]
    expected = torch.tensor([probs_V[a] * probs_V[b] / (1 - probs_V[a]) for a, b in cells]) * num_positions
    counts = torch.tensor([int((pairs == torch.tensor(cell)).all(1).sum()) for cell in cells])
    assert counts.sum() == num_positions
    assert p_value(float(((counts - expected) ** 2 / expected).sum()), len(cells) - 1) > LEAST_P_VALUE


def test_noise_follows_rows_and_identities() -> None:
    """Scores are those of the positions at the time, whatever was asked for before; what is past is dropped."""
    rows, identities, probs_XFV = [[1, 2], [3]], [(5, 0), (5, 1)], torch.full((2, 1, 9), 1 / 9)
    noise = PositionNoise(identities, rows)

    def expected(positions: list[int]) -> Tensor:
        return probs_XFV / exponentials(identities, positions, 9)[:, None]

    assert torch.equal(noise.scores(probs_XFV, [2, 0], [0, 1]), expected([4, 1]))
    assert torch.equal(noise.scores(probs_XFV, [0, 1], [0, 1]), expected([2, 2]))
    rows[0] += [4, 5]
    assert torch.equal(noise.scores(probs_XFV, [0, 4], [0, 1]), expected([4, 5]))
    assert all(position >= len(rows[row]) for row, _, position, _ in noise._kept)
    drafted = noise.following([[1] * 7, [3] * 8])
    assert torch.equal(drafted.scores(probs_XFV, [1, 0], [0, 1]), expected([8, 8]))
    identities[1], rows[1] = (6, 0), [7]
    assert torch.equal(noise.scores(probs_XFV, [0, 4], [0, 1]), expected([4, 5]))
