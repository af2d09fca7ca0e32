"""Self-drafting by the target with some sublayers skipped (Draft & Verify, 2309.08168), in the target's own cache.

Nothing is trained and no state is kept between steps: drafts read the exact keys and values of the committed text and
write their own after them, which verification overwrites. The sublayers to skip are searched in advance, or `online`
during generation (SWIFT, 2410.06916).

Shape suffixes: B rows, T tokens of a text, N nodes, M new nodes, D hidden width, V vocabulary.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from draftsmith.core import drafter
from draftsmith.core.drafter import Session, Step
from draftsmith.core.target import Target
from draftsmith.core.tree import Draft, Tree
from draftsmith.length import policies
from draftsmith.parts import autoregressive
from draftsmith.parts.checks import MAX_DEPTH, check_at_least, check_each
from draftsmith.parts.self_drafting.sublayers import Sublayers, draft_hidden, sublayers


@dataclass(frozen=True, kw_only=True)
class Config:
    """The skipped sublayers, the shape of drafts, and the online search for better sublayers."""

    attention: tuple[int, ...] = ()
    """Blocks, from 0, whose attention is skipped."""
    mlp: tuple[int, ...] = ()
    """Blocks whose MLP is skipped."""
    num_draft: int = 8
    """Maximum number of tokens drafted per round."""
    length: str = "adaptive=0.6"
    """Draft-length policy of chains, kept between calls: a name of draftsmith/length/policies.py, and its number."""
    width: int = 0
    """If not 0, drafts are dynamic trees: the `width` likeliest nodes per level get `width` children each."""
    num_nodes: int = 16
    """Number of nodes kept in a dynamic tree."""
    online: bool = False
    """Try another choice of the same number of sublayers on the generated text at each step, and keep the best."""
    window: int = 32
    """Tokens generated before the online search begins, on which the choices of that call are compared."""
    guided_every: int = 25
    """Every `guided_every`-th choice is selected by a Gaussian process; the others are random."""
    good_enough: float = 0.93
    """Share of those tokens predicted correctly at which the search stops."""
    patience: int = 300
    """Choices in succession without improvement after which the search stops."""
    max_trials: int = 1000
    """Maximum number of choices tried per call."""

    def __post_init__(self) -> None:
        autoregressive.check_shape(self)
        policies.make(self.length)
        for name in ("attention", "mlp"):
            blocks = getattr(self, name)
            if len(set(blocks)) < len(blocks) or min(blocks, default=0) < 0:
                raise ValueError(f"{name} is {list(blocks)}; it must list blocks from 0 up, none twice")
        check_at_least(self, 1, "window", "guided_every", "patience", "max_trials")
        check_each(self, 0, "attention", "mlp", most=MAX_DEPTH)
        if not 0 < self.good_enough <= 1:
            raise ValueError(f"good_enough is {self.good_enough}; it must be above 0 and at most 1")

    @property
    def supports_early_stop(self) -> bool:
        return not self.width


class Drafter(drafter.Drafter):
    """The target without the sublayers in `skipped`."""

    row_state = ("_prompt_lengths", "_is_running")
    serving_engines = ("vllm", "sglang", "llama.cpp", "openvino")

    def __init__(self, config: Config, target: Target) -> None:
        last = max((*config.attention, *config.mlp), default=0)
        if last >= target.num_layers:
            raise ValueError(
                f"block {last} is to be skipped, and {target.name} has blocks 0 to {target.num_layers - 1}"
            )
        self.config = config
        self.target = target
        self.policy = policies.make("fixed" if config.width else config.length)
        self.skipped = sublayers(config.attention, config.mlp)
        target.check_splits(self.skipped)
        if config.width:
            target.check_trees(f"and width is {config.width}, for trees")
        if config.online and target.is_recurrent:
            raise ValueError(f"{target.name} has recurrent layers, whose cache the online search cannot set back")

    def start(self, session: Session) -> None:
        self._session = session
        self._prompt_lengths = [len(row) for row in session.rows]
        self._is_running = [True] * len(session.rows)
        self._online_search: _OnlineSearch | None = None

    def change_rows(self, origins: list[int | None], new: Session | None) -> bool:
        self._online_search = None
        return super().change_rows(origins, new)

    def propose(self, budget: int) -> Draft:
        if self.config.online:
            self._search()
        return autoregressive.draft(self._logits, self._session, self.config, budget)

    def observe(self, step: Step) -> None:
        self._is_running = [len(path) > 0 for path in step.paths]

    def _logits(self, tokens_BN: Tensor, tree: Tree, first: int) -> Tensor:
        """Returns the logits [B, M, V] after the nodes from `first` on."""
        cache, skipped = self._session.cache, self.skipped
        out = self.target.forward(tokens_BN[:, first:], tree, cache, skipped=skipped, first=first)
        return self.target.logits(out.hidden_BND)

    def _search(self) -> None:
        """Makes one step of the online search, which begins once every running row has a window of new text."""
        session, window = self._session, self.config.window
        if self._online_search is None:
            rows = [row for row, runs in zip(session.rows, self._is_running, strict=True) if runs]
            prompts = [num for num, runs in zip(self._prompt_lengths, self._is_running, strict=True) if runs]
            if any(len(row) - num <= window for row, num in zip(rows, prompts, strict=True)):
                return
            self._online_search = _OnlineSearch(self.target, rows, self.config, self.skipped)
        if self._online_search.should_continue:
            self.skipped = self._online_search.next(session.generator)


class _OnlineSearch:
    """One call's search over choices of the same number of sublayers, scored on the last tokens of its rows.

    It never skips sublayers of the first and last block; a given choice that does is scored as it is.
    """

    NUM_CANDIDATES, OPTIMISM, NOISE = 256, 2.5, 1e-2

    def __init__(self, target: Target, rows: list[list[int]], config: Config, skipped: Sublayers) -> None:
        self._target, self._config = target, config
        self._rows_BT = torch.tensor([row[-config.window - 2 :] for row in rows], device=target.device)
        # The pending token is the last label; all tokens before it are read once, and the cache cut at the window.
        self._cache = target.new_cache(len(rows))
        target.prefill([row[:-1] for row in rows], self._cache)
        self._cache.lengths = [number - config.window - 1 for number in self._cache.lengths]
        self._bits = [(kind, block) for kind in ("attention", "mlp") for block in range(1, target.num_layers - 1)]
        self._num_skipped = min(len(skipped), len(self._bits))
        self._masks: list[np.ndarray] = []
        self._scores: list[float] = []
        self._num_worse = 0
        self.best, self.best_score = skipped, self._score(skipped)
        self._record(skipped, self.best_score)

    @property
    def should_continue(self) -> bool:
        config = self._config
        is_exhausted = self._num_worse > config.patience or len(self._scores) > config.max_trials
        return 0 < self._num_skipped < len(self._bits) and self.best_score <= config.good_enough and not is_exhausted

    def next(self, generator: torch.Generator) -> Sublayers:
        """Tries another choice and returns the best so far."""
        is_guided = len(self._scores) % self._config.guided_every == 0
        candidates = [self._random(generator) for _ in range(self.NUM_CANDIDATES if is_guided else 1)]
        skipped = candidates[self._most_promising(candidates) if is_guided else 0]
        score = self._score(skipped)
        self._record(skipped, score)
        if score > self.best_score:
            self.best, self.best_score, self._num_worse = skipped, score, 0
        else:
            self._num_worse += 1
        return self.best

    def _random(self, generator: torch.Generator) -> Sublayers:
        order = torch.randperm(len(self._bits), generator=generator)[: self._num_skipped]
        return frozenset(self._bits[index] for index in order.tolist())

    def _score(self, skipped: Sublayers) -> float:
        """Returns the share of the window's tokens that drafting would have predicted."""
        hidden_BTD = draft_hidden(self._target, self._rows_BT[:, :-1], self._cache, skipped, self._config.num_draft)
        predictions_BT = self._target.logits(hidden_BTD).argmax(-1)
        return (predictions_BT == self._rows_BT[:, 2:]).float().mean().item()

    def _record(self, skipped: Sublayers, score: float) -> None:
        self._masks.append(np.array([bit in skipped for bit in self._bits], dtype=float))
        self._scores.append(score)

    def _most_promising(self, candidates: list[Sublayers]) -> int:
        """Returns the index of the candidate with the largest mean + `OPTIMISM` deviations under a Gaussian process.

        Its kernel is exp(-differing bits / mean number of bits set), its observations the scores, standardised.
        """
        tried, scores = np.array(self._masks), np.array(self._scores)
        new = np.array([[bit in one for bit in self._bits] for one in candidates], dtype=float)

        def kernel(one: np.ndarray, other: np.ndarray) -> np.ndarray:
            return np.exp(-np.abs(one[:, None] - other).sum(-1) / self._num_skipped)

        observed = kernel(tried, tried) + self.NOISE * np.eye(len(tried))
        across = kernel(new, tried)
        weights = np.linalg.solve(observed, across.T)
        mean = weights.T @ ((scores - scores.mean()) / (scores.std() + 1e-9))
        variance = 1 - (across * weights.T).sum(1)
        return int((mean + self.OPTIMISM * np.sqrt(variance.clip(0))).argmax())
