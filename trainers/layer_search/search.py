"""Search for the bit string with the highest score, evaluating each string once, with a crash-safe log.

The next string depends on the seed and the scores so far only, so that an interrupted search continues unchanged.
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
"""Number of best scores that a Gaussian process is fitted to; its time grows with the cube of their number."""
Report = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, kw_only=True)
class Space:
    """The bit strings of length `num_bits`, with `num_ones` ones if that is given."""

    num_bits: int
    num_ones: int | None = None
    """None for any number."""

    @property
    def size(self) -> int:
        """Number of strings."""
        return 2**self.num_bits if self.num_ones is None else comb(self.num_bits, self.num_ones)

    def random(self, rng: np.random.Generator) -> Bits:
        """Returns a string with a random number of ones, unless it is given, at random indices."""
        num_ones = int(rng.integers(self.num_bits + 1)) if self.num_ones is None else self.num_ones
        return self.ones(rng.permutation(self.num_bits)[:num_ones].tolist())

    def ones(self, indices: Sequence[int]) -> Bits:
        """Returns the string with ones at these indices."""
        chosen = set(indices)
        return tuple(int(index in chosen) for index in range(self.num_bits))

    def neighbours(self, bits: Bits) -> list[Bits]:
        """Returns the strings with one bit flipped or, if the number of ones is fixed, a one and a zero swapped."""
        if self.num_ones is None:
            return [(*bits[:index], 1 - bits[index], *bits[index + 1 :]) for index in range(self.num_bits)]
        ones = [index for index, bit in enumerate(bits) if bit]
        zeros = [index for index, bit in enumerate(bits) if not bit]
        return [self.ones([*(one for one in ones if one != out), new]) for out in ones for new in zeros]


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
    if method == "greedy" and (neighbours := _untried_neighbours(space, scores)):
        return neighbours[int(rng.integers(len(neighbours)))], "greedy"
    if method == "gp" and len(scores) > 1:
        return _guided(space, scores, rng, is_local=len(scores) % GuidedClimb.LOCAL_EVERY == 0)
    while (bits := space.random(rng)) in scores:
        pass
    return bits, "random"


def _untried_neighbours(space: Space, scores: dict[Bits, float]) -> list[Bits]:
    """Returns the neighbours without a score of the best string that has any."""
    for bits in sorted(scores, key=scores.__getitem__, reverse=True):
        untried = [one for one in space.neighbours(bits) if one not in scores]
        if untried:
            return untried
    return []


class GuidedClimb(acquisition.UpperConfidenceBound):
    """Maximises the upper confidence bound, mean + kappa * deviation, by hill climbing over neighbouring strings.

    bayes_opt's own optimiser searches the continuous unit cube, whose points are almost never bit strings.
    """

    KAPPA, LOCAL_EVERY = 0.5, 3
    NUM_TOP, MAX_NEIGHBOURS = 4, 256

    def __init__(self, space: Space, scores: dict[Bits, float], rng: np.random.Generator, *, is_local: bool) -> None:
        super().__init__(kappa=0.0 if is_local else self.KAPPA)
        self._space, self._scores, self._rng, self._is_local = space, scores, rng, is_local

    def suggest(self, gp: GaussianProcessRegressor, target_space: Any, *_: Any, **__: Any) -> np.ndarray:
        """Returns the string without a score that has the highest bound found."""
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
                around = [around[index] for index in kept]
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
    """Returns the string suggested by a Gaussian process with a linear kernel plus one of the Hamming distance."""
    names = [f"bit{index:04d}" for index in range(space.num_bits)]
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
    suggested = optimizer.suggest()
    return tuple(int(suggested[name] > 0.5) for name in names), "local" if is_local else "gp"


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
