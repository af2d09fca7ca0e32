"""Search for the bit string with the highest score, evaluating each string once, with a crash-safe log.

The next string depends on the seed and the scores so far only, so that an interrupted search continues unchanged.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from trainers.layer_search.bits import Bits, Space, untried_neighbours
from trainers.training import jsonl

METHODS = ("gp", "greedy", "random")
Report = Callable[[dict[str, Any]], None]


def propose(
    method: str, space: Space, scores: dict[Bits, float], starts: Sequence[Bits], seed: int
) -> tuple[Bits, str] | None:
    """Returns a string without a score and how it was found, None if there is none left.

    The `starts` come first; then random strings, neighbours of the best string (greedy), or, with "gp", the string of
    highest upper confidence bound under a Gaussian process, alternating with the best neighbour by its mean.
    """
    if len(scores) >= space.size:
        return None
    for start in starts:
        if start not in scores:
            return start, "start"
    rng = np.random.default_rng([seed, len(scores)])
    if method == "greedy" and (neighbours := untried_neighbours(space, scores)):
        return neighbours[int(rng.integers(len(neighbours)))], "greedy"
    if method == "gp" and len(scores) > 1:
        from trainers.layer_search import gaussian_process

        return gaussian_process.suggest(space, scores, rng)
    while (bits := space.random(rng)) in scores:
        pass
    return bits, "random"


def search(
    method: str,
    space: Space,
    score_of: Callable[[Bits], dict[str, float]],
    starts: Sequence[Bits],
    *,
    num_evaluations: int,
    seed: int,
    path: Path,
    report: Report = lambda line: None,
) -> Bits:
    """Returns the best string after `num_evaluations` evaluations, including those already in the log at `path`.

    `score_of` returns a "score" and other values to log. Each result is appended to the log and on disk before the next
    evaluation begins. Its exceptions end the search, as a string that fails is not one with a low score.
    """
    scores: dict[Bits, float] = {_parsed(line["bits"]): line["score"] for line in jsonl.read(path)}
    interval = 0.5 if sys.stderr.isatty() else 20
    path.touch()
    with tqdm(
        total=num_evaluations, initial=len(scores), desc=f"search ({method})", unit="mask", mininterval=interval
    ) as bar:
        while len(scores) < num_evaluations and (proposed := propose(method, space, scores, starts, seed)):
            bits, found_by = proposed
            assert bits not in scores
            results = score_of(bits)
            scores[bits] = results["score"]
            line = {"step": len(scores), "bits": "".join(map(str, bits)), "by": found_by, **results}
            line["best"] = max(scores.values())
            jsonl.append(path, line)
            report(line)
            bar.set_postfix_str(f"best {line['best']:.3f}", refresh=False)
            bar.update()
    return max(scores, key=scores.__getitem__)


def _parsed(text: str) -> Bits:
    return tuple(int(bit) for bit in text)
