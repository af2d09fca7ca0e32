"""Tests of the Kneser-Ney model against its formulas, computed with dictionaries, on random texts."""

import errno
import os
from collections import Counter, defaultdict
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as some
from safetensors.numpy import save_file

from draftsmith.drafters.ngram.kneser_ney import KneserNey, discounts
from trainers.corpora.kneser_ney import build, count_ngrams

VOCAB_SIZE = 4
Texts = list[list[int]]
TEXTS = some.lists(some.lists(some.integers(0, VOCAB_SIZE - 1), max_size=30), max_size=4)


class SlowKneserNey:
    """Kneser-Ney by its formulas, recursively from each context to the empty one."""

    def __init__(self, texts: Texts, order: int) -> None:
        self.order = order
        counts: Counter[tuple[int, ...]] = Counter()
        for text in texts:
            padded = [VOCAB_SIZE] * (order - 1) + text
            counts.update(tuple(padded[end - order : end]) for end in range(order, len(padded) + 1))
        self.counts = {order: counts}
        for size in range(order - 1, 0, -1):
            self.counts[size] = Counter(ngram[1:] for ngram in self.counts[size + 1])
        self.discounts, self.successors = {}, defaultdict(dict)
        for size, of_size in self.counts.items():
            num = [sum(count == wanted for count in of_size.values()) for wanted in (1, 2, 3, 4)]
            self.discounts[size] = self.discounts_of(*num)
            for ngram, count in of_size.items():
                self.successors[ngram[:-1]][ngram[-1]] = count

    @staticmethod
    def discounts_of(n1: int, n2: int, n3: int, n4: int) -> list[float]:
        if 0 in (n1, n2, n3, n4):
            return [0.5, 1.0, 1.5]
        y = n1 / (n1 + 2 * n2)
        found = [1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3]
        return found if min(found) > 0 else [0.5, 1.0, 1.5]

    def probability(self, token: int, context: tuple[int, ...]) -> float:
        shorter = self.probability(token, context[1:]) if context else 1 / VOCAB_SIZE
        found = self.successors.get(context, {})
        total = sum(found.values())
        if not total:
            return shorter
        of_size = self.discounts[len(context) + 1]
        lost = [sum(min(count, 3) == kind for count in found.values()) * of_size[kind - 1] for kind in (1, 2, 3)]
        count = found.get(token, 0)
        discounted = max(count - of_size[min(count, 3) - 1], 0) if count else 0
        return discounted / total + sum(lost) / total * shorter

    def probs(self, text: list[int]) -> list[float]:
        context = tuple(([VOCAB_SIZE] * self.order + text)[len(text) + 1 :])
        return [self.probability(token, context) for token in range(VOCAB_SIZE)]


def build_model(texts: Texts, order: int, folder: Path, *, num_parts: int = 1, **options: float) -> KneserNey:
    """Returns the model of `texts`, counted in `num_parts` parts."""
    folder.mkdir(exist_ok=True)
    files = []
    for part in range(num_parts):
        files.append(folder / f"{part}.safetensors")
        save_file(
            count_ngrams([np.array(text, dtype=np.int64) for text in texts[part::num_parts]], order, VOCAB_SIZE),
            files[-1],
        )
    return build(files, order, VOCAB_SIZE, folder / "store", **options)


def contexts(order: int) -> list[list[int]]:
    """Returns all texts up to one token more than the longest context."""
    return [list(text) for size in range(min(order, 3) + 1) for text in product(range(VOCAB_SIZE), repeat=size)]


@settings(max_examples=40, deadline=None)
@given(TEXTS, some.integers(1, 5), some.integers(1, 3), some.integers(1, 20))
@example([], 3, 1, 1)
@example([[]], 5, 2, 1)
@example([[2]], 3, 1, 1)
@example([[1] * 20], 4, 2, 3)
@example([[3], [0], [3]], 5, 3, 1)
@example([[0, 1] * 12, [0, 1, 2] * 5, [1]], 5, 2, 7)
def test_distribution_equals_the_formulas(texts: Texts, order: int, num_parts: int, max_ngrams: int) -> None:
    slow = SlowKneserNey(texts, order)
    with TemporaryDirectory() as folder:
        model = build_model(texts, order, Path(folder), num_parts=num_parts, max_ngrams=max_ngrams)
        longer = [text[:end] for text in texts for end in range(4, len(text), 3)]
        for context in contexts(order) + longer:
            path = model.path(context)
            probs_V = model.probs(path)
            assert abs(probs_V.sum() - 1) < 1e-9
            assert probs_V == pytest.approx(slow.probs(context), abs=1e-12)
            assert model.token_probs(path, np.arange(VOCAB_SIZE)) == pytest.approx(probs_V, abs=1e-15)
            token, probability = model.best(path)
            assert probs_V[token] >= probs_V.max() - 1e-15
            assert probability == pytest.approx(probs_V[token], rel=1e-3)


@settings(max_examples=20, deadline=None)
@given(TEXTS, some.integers(1, 5), some.sampled_from(["reload", "budget"]))
def test_saved_or_pruned_model_has_distributions(texts: Texts, order: int, change: str) -> None:
    with TemporaryDirectory() as name:
        folder = Path(name)
        model = build_model(texts, order, folder)
        if change == "reload":
            (folder / "copy").mkdir()
            model.save(folder / "copy")
            other = KneserNey.load(folder / "copy", VOCAB_SIZE)
        else:
            size = model.num_bytes / 2e6 + 2e-4
            other = build_model(texts, order, folder, budget_mb=size, max_ngrams=9)
            assert other.num_bytes <= size * 1e6
        for text in contexts(order):
            probs_V = other.probs(other.path(text))
            assert abs(probs_V.sum() - 1) < 1e-9
            assert probs_V[other.best(other.path(text))[0]] >= probs_V.max() - 1e-15
            if change == "reload":
                assert (probs_V == model.probs(model.path(text))).all()


def test_discounts_by_hand() -> None:
    """Y = 8 / (8 + 2 * 4) = 1/2: D(1) = 1 - 2 * 4 / 8 / 2, D(2) = 2 - 3 * 2 / 4 / 2, D(3) = 3 - 4 * 1 / 2 / 2."""
    assert discounts([8, 4, 2, 1]) == pytest.approx((0, 0.5, 1.25, 2.0))
    assert discounts([8, 4, 0, 1]) == discounts([2, 1, 9, 1]) == (0, 0.5, 1.0, 1.5), "n(3) is 0, or D(2) < 0"


def test_pruning_drops_the_longest_ngrams_that_matter_least(tmp_path: Path) -> None:
    """The others keep their share, (c - D(c)) / c(h); the pruned shares go to the shorter context."""
    rng = np.random.default_rng(0)
    noise = [rng.integers(0, VOCAB_SIZE, 40).tolist() for _ in range(4)]
    texts = [*noise, *[[0, 1, 2, 3, 3, 2, 1, 0]] * 20]
    whole = build_model(texts, 3, tmp_path / "whole")
    pruned = build_model(texts, 3, tmp_path / "pruned", budget_mb=whole.num_bytes * 0.75e-6)
    assert pruned.num_bytes <= whole.num_bytes * 0.75
    loss_kept, loss_pruned = [], []
    for context in product(range(VOCAB_SIZE), repeat=2):
        path = whole.path(context)
        probs_V, shorter_V = whole.probs(path), whole.probs(path[:2])
        share_V = probs_V - whole.weights_C[path[2]] * shorter_V
        kept = stored_after(pruned, pruned.path(context))
        for token, count in stored_after(whole, path).items():
            lost = count * np.log(probs_V[token] / (probs_V[token] - share_V[token]))
            (loss_kept if token in kept else loss_pruned).append(lost)
        left = 1 - sum(share_V[token] for token in kept)
        expected_V = left * shorter_V + np.array([share_V[token] * (token in kept) for token in range(VOCAB_SIZE)])
        assert pruned.probs(pruned.path(context)) == pytest.approx(expected_V, abs=1e-12)
    assert loss_kept and loss_pruned and min(loss_kept) > max(loss_pruned) * 0.95


def stored_after(model: KneserNey, path: list[int]) -> dict[int, int]:
    """Returns the counts of the tokens after the context of two tokens that ends `path`."""
    pairs = slice(*model.begins_X[path[2] : path[2] + 2].tolist()) if len(path) > 2 else slice(0)
    return dict(zip(model.tokens_E[pairs].tolist(), model.counts_E[pairs].tolist(), strict=True))


def test_load_rejects_damaged_files(tmp_path: Path) -> None:
    model = build_model([[0, 1, 2, 3] * 9], 3, tmp_path)
    for name, damage in {
        "keys_C": lambda file: file.write_bytes(file.read_bytes()[:-9]),
        "counts_E": lambda file: file.unlink(),
        "tokens_E": lambda file: file.write_bytes(b"no array at all"),
        "best_C": lambda file: np.save(file, np.zeros(3, np.uint8)),
        "chances_C": lambda file: np.save(file, model.best_C),
        "begins_X": lambda file: np.save(file, np.zeros_like(model.begins_X)),
        "discounts_OX": lambda file: np.save(file, np.zeros((3, 3))),
    }.items():
        folder = tmp_path / name
        folder.mkdir()
        model.save(folder)
        damage(folder / f"{name}.npy")
        with pytest.raises(ValueError, match=rf"{name}.*made again"):
            KneserNey.load(folder, VOCAB_SIZE)


TEXTS = [[1, 2, 3, 1, 2], [2, 1, 2, 3, 0, 1, 2]]


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0, 2.0])
@pytest.mark.parametrize("name", ["weights_C", "chances_C", "discounts_OX"])
def test_load_rejects_probabilities_out_of_range(tmp_path: Path, name: str, value: float) -> None:
    build_model(TEXTS, 3, tmp_path)
    file = tmp_path / "store" / f"{name}.npy"
    KneserNey.load(file.parent, VOCAB_SIZE)
    array = np.load(file)
    array.reshape(-1)[0] = value
    np.save(file, array)
    with pytest.raises(ValueError, match=f"{name}.npy holds values out of range; the artifact must be made again"):
        KneserNey.load(file.parent, VOCAB_SIZE)


@pytest.mark.parametrize("name", ["keys_C", "begins_X", "totals_C", "tokens_E", "counts_E", "best_C"])
def test_load_rejects_counts_and_indices_out_of_range(tmp_path: Path, name: str) -> None:
    build_model(TEXTS, 3, tmp_path)
    file = tmp_path / "store" / f"{name}.npy"
    array = np.load(file)
    array[1] = 0 if name in ("totals_C", "counts_E") else np.iinfo(array.dtype).max
    np.save(file, array)
    with pytest.raises(ValueError, match="out of range|do not fit each other"):
        KneserNey.load(file.parent, VOCAB_SIZE)


def test_build_reserves_space_before_it_writes_to_a_map(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk would end the process with a bus error."""
    reserved: list[int] = []

    def reserve(descriptor: int, offset: int, size: int) -> None:
        if len(reserved) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        assert not any(os.pread(descriptor, size, 128))  # nothing but the header is written
        reserved.append(size)

    monkeypatch.setattr(os, "posix_fallocate", reserve)
    with pytest.raises(OSError, match="No space left"):
        build_model(TEXTS, 3, tmp_path)
    assert len(reserved) == 3
    monkeypatch.undo()
    assert build_model(TEXTS, 3, tmp_path).num_bytes > 0
