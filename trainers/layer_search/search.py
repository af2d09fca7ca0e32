"""Search for the bit string with the highest score, each string being scored once, and a log that survives `kill -9`.

What is scored next follows from the seed and the scores so far alone, so that a search that was killed goes on as if
it had not been.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
from bayes_opt import BayesianOptimization, acquisition
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, DotProduct, Matern
from tqdm import tqdm

from trainers.training import jsonl

Bits = tuple[int, ...]
METHODS = ("gp", "greedy", "random")
MAX_FITTED = 256
"""Scores that a Gaussian process is fitted to, the best ones: its time grows with the cube of their number."""
Report = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, kw_only=True)
class Space:
    """All strings of so many bits, or those with so many ones."""

    num_bits: int
    num_ones: int | None = None
    """None for any number."""

    @property
    def size(self) -> int:
        return 2**self.num_bits if self.num_ones is None else comb(self.num_bits, self.num_ones)

    def random(self, rng: np.random.Generator) -> Bits:
        """Returns a string with a random number of ones, unless that is given, in random places."""
        num_ones = int(rng.integers(self.num_bits + 1)) if self.num_ones is None else self.num_ones
        return self.ones(rng.permutation(self.num_bits)[:num_ones].tolist())

    def ones(self, places: Sequence[int]) -> Bits:
        """Returns the string with ones at these places."""
        found = set(places)
        return tuple(int(place in found) for place in range(self.num_bits))

    def neighbours(self, bits: Bits) -> list[Bits]:
        """Returns the strings with one bit flipped, or, where the number of ones is given, a one and a zero swapped."""
        if self.num_ones is None:
            return [(*bits[:place], 1 - bits[place], *bits[place + 1 :]) for place in range(self.num_bits)]
        ones = [place for place, bit in enumerate(bits) if bit]
        zeros = [place for place, bit in enumerate(bits) if not bit]
        return [self.ones([*(one for one in ones if one != out), new]) for out in ones for new in zeros]


def propose(
    method: str, space: Space, scores: dict[Bits, float], starts: Sequence[Bits], seed: int
) -> tuple[Bits, str] | None:
    """Returns a string not scored yet and how it was found, None if there is none left.

    First come the `starts`; then random strings, or neighbours of the best (greedy), or (gp) what a Gaussian process
    of the scores promises most of, and in between the best string's neighbour that it expects most of.
    """
    if len(scores) >= space.size:
        return None
    for start in starts:
        if start not in scores:
            return start, "start"
    rng = np.random.default_rng([seed, len(scores)])
    if method == "greedy" and (neighbours := _untried_neighbours(space, scores)):
        return neighbours[int(rng.integers(len(neighbours)))], "greedy"
    if method == "gp" and len(scores) > 1:
        return _guided(space, scores, rng, is_local=len(scores) % GuidedClimb.LOCAL_EVERY == 0)
    while (bits := space.random(rng)) in scores:
        pass
    return bits, "random"


def _untried_neighbours(space: Space, scores: dict[Bits, float]) -> list[Bits]:
    """Returns the neighbours not scored yet of the best string that has any."""
    for bits in sorted(scores, key=scores.__getitem__, reverse=True):
        found = [one for one in space.neighbours(bits) if one not in scores]
        if found:
            return found
    return []


class GuidedClimb(acquisition.UpperConfidenceBound):
    """mean + kappa * deviation, climbed from string to neighbouring string.

    bayes_opt's own climbs are in the box around them, where almost nothing is a string.
    """

    KAPPA, LOCAL_EVERY = 0.5, 3
    NUM_TOP, MAX_NEIGHBOURS = 4, 256

    def __init__(self, space: Space, scores: dict[Bits, float], rng: np.random.Generator, *, is_local: bool) -> None:
        super().__init__(kappa=0.0 if is_local else self.KAPPA)
        self._space, self._scores, self._rng, self._is_local = space, scores, rng, is_local

    def suggest(self, gp: GaussianProcessRegressor, target_space: Any, *_: Any, **__: Any) -> np.ndarray:
        """Returns the best string found that has no score yet."""
        self._fit_gp(gp, target_space)
        self._bounds: dict[Bits, float] = {}
        best = sorted(self._scores, key=self._scores.__getitem__, reverse=True)[: self.NUM_TOP]
        if self._is_local:
            self._bound(gp, _untried_neighbours(self._space, self._scores))
        else:
            for bits in best:
                self._climb(gp, bits)
        untried = [bits for bits in self._bounds if bits not in self._scores]
        if not untried:
            untried = _untried_neighbours(self._space, self._scores)
            self._bound(gp, untried)
        return np.array(max(untried, key=self._bounds.__getitem__), dtype=float)

    def _climb(self, gp: GaussianProcessRegressor, bits: Bits) -> None:
        self._bound(gp, [bits])
        while True:
            around = self._space.neighbours(bits)
            if len(around) > self.MAX_NEIGHBOURS:
                kept = self._rng.choice(len(around), self.MAX_NEIGHBOURS, replace=False)
                around = [around[place] for place in kept]
            self._bound(gp, around)
            best = max(around, key=self._bounds.__getitem__)
            if self._bounds[best] <= self._bounds[bits]:
                return
            bits = best

    def _bound(self, gp: GaussianProcessRegressor, strings: list[Bits]) -> None:
        new = [bits for bits in strings if bits not in self._bounds]
        if new:
            mean, deviation = gp.predict(np.array(new, dtype=float), return_std=True)
            self._bounds |= dict(zip(new, self.base_acq(mean, deviation).tolist(), strict=True))


def _guided(space: Space, scores: dict[Bits, float], rng: np.random.Generator, *, is_local: bool) -> tuple[Bits, str]:
    """Asks a Gaussian process, linear in the bits but for a part that is smooth in their number that differ."""
    names = [f"bit{place:04d}" for place in range(space.num_bits)]
    optimizer = BayesianOptimization(
        f=None,
        pbounds=dict.fromkeys(names, (0.0, 1.0)),
        acquisition_function=GuidedClimb(space, scores, rng, is_local=is_local),
        random_state=0,
        verbose=0,
    )
    kernel = ConstantKernel(0.1) * DotProduct(sigma_0=1.0) + ConstantKernel(1.0) * Matern(3.0, nu=2.5)
    optimizer.set_gp_params(kernel=kernel, alpha=1e-3, n_restarts_optimizer=0)
    for bits in sorted(scores, key=scores.__getitem__, reverse=True)[:MAX_FITTED]:
        optimizer.register(params=np.array(bits, dtype=float), target=scores[bits])
    found = optimizer.suggest()
    return tuple(int(found[name] > 0.5) for name in names), "local" if is_local else "gp"


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
    """Returns the best string of so many evaluations, those already in the log at `path` among them.

    `evaluate` returns a "score" and whatever else is to be noted. Each is appended to the log, and safely on disk,
    before the next begins. What it raises ends the search: a choice that cannot be run is no bad choice.
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
            found = score_of(bits)
            scores[bits] = found["score"]
            line = {"step": len(scores), "bits": "".join(map(str, bits)), "by": found_by, **found}
            line["best"] = max(scores.values())
            jsonl.append(path, line)
            report(line)
            bar.set_postfix_str(f"best {line['best']:.3f}", refresh=False)
            bar.update()
    return max(scores, key=scores.__getitem__)


def _parsed(text: str) -> Bits:
    return tuple(int(bit) for bit in text)
