"""The search over bit strings: proposals, no repeated evaluation, and resuming."""

from pathlib import Path

import numpy as np
import pytest

from trainers.layer_search.bits import Bits, Space
from trainers.layer_search.search import METHODS, propose, search

SPACE = Space(num_bits=8)
VALUES = (3.0, -1.0, 2.0, -2.0, 0.5, -0.5, 1.0, -3.0)


def value_of(bits: Bits) -> dict[str, float]:
    """Returns the sum of the values of the bits set, minus 1.5 if the first two are set together."""
    return {"score": sum(w for bit, w in zip(bits, VALUES, strict=True) if bit) - 1.5 * bits[0] * bits[2]}


BEST = (1, 0, 1, 0, 1, 0, 1, 0)


def test_neighbours_by_hand() -> None:
    assert Space(num_bits=3).neighbours((0, 1, 0)) == [(1, 1, 0), (0, 0, 0), (0, 1, 1)]
    swaps = Space(num_bits=4, num_ones=2).neighbours((1, 0, 1, 0))
    assert sorted(swaps) == [(0, 0, 1, 1), (0, 1, 1, 0), (1, 0, 0, 1), (1, 1, 0, 0)]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("num_ones", [None, 2])
def test_every_string_is_evaluated_once(tmp_path: Path, method: str, num_ones: int | None) -> None:
    space, seen = Space(num_bits=5, num_ones=num_ones), []

    def evaluate(bits: Bits) -> dict[str, float]:
        seen.append(bits)
        assert num_ones is None or sum(bits) == num_ones
        return {"score": float(bits[0] - bits[1])}

    start = space.ones([0, 3])
    search(method, space, evaluate, [start, start], num_evaluations=99, seed=0, path=tmp_path / "log")
    assert len(seen) == len(set(seen)) == space.size == (32 if num_ones is None else 10)
    assert seen[0] == start


@pytest.mark.parametrize("method", METHODS)
def test_an_interrupted_search_continues_unchanged(tmp_path: Path, method: str) -> None:
    def run(name: str, evaluate: object = value_of) -> str:
        path = tmp_path / name
        search(method, SPACE, evaluate, [(1,) * 8], num_evaluations=14, seed=3, path=path)  # type: ignore[arg-type]
        return path.read_text()

    whole = run("whole")
    assert len(whole.splitlines()) == 14
    for num_lines, fragment in ((0, ""), (1, '{"st'), (9, ""), (13, whole.splitlines()[13][:-1])):
        left = "".join(line + "\n" for line in whole.splitlines()[:num_lines]) + fragment
        (tmp_path / "broken").write_text(left)
        assert run("broken") == whole


def test_an_exception_ends_the_search_without_a_score(tmp_path: Path) -> None:
    calls = []

    def evaluate(bits: Bits) -> dict[str, float]:
        calls.append(bits)
        if len(calls) == 4:
            raise RuntimeError("out of memory")
        return value_of(bits)

    with pytest.raises(RuntimeError, match="out of memory"):
        search("random", SPACE, evaluate, [], num_evaluations=9, seed=0, path=tmp_path / "log")
    assert len((tmp_path / "log").read_text().splitlines()) == 3


def test_the_log_has_every_result_and_the_best_so_far(tmp_path: Path) -> None:
    lines: list[dict[str, float]] = []
    best = search("greedy", SPACE, value_of, [], num_evaluations=30, seed=0, path=tmp_path / "log", report=lines.append)
    scores = [line["score"] for line in lines]
    assert [line["best"] for line in lines] == np.maximum.accumulate(scores).tolist()
    assert [line["step"] for line in lines] == list(range(1, 31))
    assert value_of(best)["score"] == max(scores)


@pytest.mark.parametrize("method", ["greedy", "gp"])
def test_greedy_and_gp_find_the_best_string(tmp_path: Path, method: str) -> None:
    """They take 40 of 256 evaluations, with which random search succeeds one time in six."""
    best = search(method, SPACE, value_of, [], num_evaluations=40, seed=0, path=tmp_path / "log")
    assert best == BEST


def test_greedy_proposes_neighbours_of_the_best_first() -> None:
    scores = {(0, 0, 0): 1.0, (1, 0, 0): 0.5, (0, 1, 0): 0.0}
    assert propose("greedy", Space(num_bits=3), scores, [], 0) == ((0, 0, 1), "greedy")
    scores[0, 0, 1] = 0.2
    assert propose("greedy", Space(num_bits=3), scores, [], 0)[0] in {(1, 1, 0), (1, 0, 1)}  # type: ignore[index]
