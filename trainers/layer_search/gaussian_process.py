"""Bit strings suggested by a Gaussian process that is fitted to the scores so far.

Imported where it is used: bayes_opt and scikit-learn take seconds to import, and every recipe lists the trainers.
"""

from typing import Any

import numpy as np
from bayes_opt import BayesianOptimization, acquisition
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, DotProduct, Matern

from trainers.layer_search.bits import Bits, Space, untried_neighbours

MAX_FITTED = 256
"""Number of best scores that a Gaussian process is fitted to; its time grows with the cube of their number."""
LOCAL_EVERY = 3
"""Every so many strings the best neighbour is suggested."""


class GuidedClimb(acquisition.UpperConfidenceBound):
    """Maximises the upper confidence bound, mean + kappa * deviation, by hill climbing over neighbouring strings.

    bayes_opt's own optimiser searches the continuous unit cube, whose points are almost never bit strings.
    """

    KAPPA = 0.5
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
            self._bound(gp, untried_neighbours(self._space, self._scores))
        else:
            for bits in best:
                self._climb(gp, bits)
        untried = [bits for bits in self._bounds if bits not in self._scores]
        if not untried:
            untried = untried_neighbours(self._space, self._scores)
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


def suggest(space: Space, scores: dict[Bits, float], rng: np.random.Generator) -> tuple[Bits, str]:
    """Returns the string suggested by a Gaussian process with a linear kernel plus one of the Hamming distance."""
    is_local = len(scores) % LOCAL_EVERY == 0
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
