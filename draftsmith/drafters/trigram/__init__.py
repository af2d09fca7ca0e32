"""Drafts trees of likely successors of the last two tokens, found by Monte Carlo tree search (ADED, 2407.12021).

A table holds the frequencies of tokens after pairs of tokens in target-generated text; each row adds tri-grams in an
overlay. No gradient training and no probabilities of the target are needed.

Shape suffixes: K pairs of tokens, S successors of all of them, T last tokens of a text.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np

from draftsmith.core import drafter
from draftsmith.core.drafter import Session, Step
from draftsmith.core.target import Target
from draftsmith.core.tree import Draft
from draftsmith.parts.checks import MAX_NODES, check_at_least, check_positive
from draftsmith.parts.retrieval import load_array
from draftsmith.parts.trie import TokenTree, heaviest_nodes, to_draft

if TYPE_CHECKING:
    from draftsmith.drafters.trigram.compiled import Nodes, Overlay

MAKERS = ("mcts", "full", "greedy")
MAX_ITERATIONS = 10_000
DTYPES = {"keys": np.int64, "begins": np.int64, "tokens": np.int32, "weights": np.float32}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the search and of the rows' own tri-grams; the defaults are the paper's constants."""

    maker: str = field(default="mcts", metadata={"choices": MAKERS})
    """Search for paths: mcts (the paper's), full (the likeliest of all paths) or greedy (a single path)."""
    num_iterations: int = 150
    """Number of paths that mcts tries."""
    depth: int = 4
    """Maximum length of a path; the draft adds one token to each, its likeliest successor."""
    num_sequences: int = 24
    """Number of paths drafted, prefixes included."""
    num_nodes: int = 64
    """Maximum number of tokens drafted, those of the best paths."""
    explore: float = 32.0
    """Weight of exploration against the mean reward: c1 of the token preference score."""
    explore_base: float = 8.0
    """Number of visits from which exploration increases: c2 of the token preference score."""
    bump: float = 0.04
    """Amount that each step adds to the weight of every tri-gram in a row's last `window` tokens; 0 adds none."""
    largest: float = 3.0
    """Largest weight that a tri-gram can get in this way."""
    window: int = 16
    """Number of a row's last tokens whose tri-grams are added."""
    chance: int = 0
    """Seed of the search: with the same tri-grams, the same two tokens get the same draft."""

    def __post_init__(self) -> None:
        if self.maker not in MAKERS:
            raise ValueError(f"maker is {self.maker!r}; it must be one of {', '.join(MAKERS)}")
        check_at_least(self, 1, "num_iterations", most=MAX_ITERATIONS)
        check_at_least(self, 1, "depth", "num_sequences", "num_nodes", most=MAX_NODES)
        check_at_least(self, 0, "explore", "bump", most=1e6)
        check_at_least(self, 0, "chance")
        check_positive(self, "explore_base", "largest")
        check_at_least(self, 3, "window")  # the length of a tri-gram


class Drafter(drafter.Drafter):
    """Searches the table, with an overlay for each row of a call."""

    row_state = ("_overlays", "_is_running")
    serving_engines = ("vllm", "llama.cpp")

    def __init__(self, config: Config, target: Target, table: Sequence[np.ndarray] = ()) -> None:
        try:
            from draftsmith.drafters.trigram import compiled
        except ImportError as error:
            raise ValueError("the tri-gram search needs numba: pip install 'draftsmith[compiled]'") from error
        self.config = config
        self.target = target
        self._compiled = compiled
        empty = [np.zeros(int(name == "begins"), dtype) for name, dtype in DTYPES.items()]
        self.table = compiled.Table(*map(_frozen, table or empty))
        self._widest = int(np.diff(self.table.begins_K).max(initial=0))
        # The first call compiles for seconds, which should not happen during decoding.
        self._search(self._with_recent(compiled.new_overlay(), [0, 0, 0]), 0, 0, 1)

    def start(self, session: Session) -> None:
        self._session = session
        self._overlays = [self._with_recent(self._compiled.new_overlay(), ids) for ids in session.rows]
        self._is_running = [True] * len(session.rows)

    def propose(self, budget: int) -> Draft:
        rows = zip(self._overlays, self._session.rows, self._is_running, strict=True)
        return to_draft(
            self._session, [self._tree(overlay, ids, budget) if runs else TokenTree() for overlay, ids, runs in rows]
        )

    def observe(self, step: Step) -> None:
        """Adds the tri-grams of the committed text, even if another drafter drafted it."""
        for row, path in enumerate(step.paths):
            self._is_running[row] = len(path) > 0
            if path:
                self._overlays[row] = self._with_recent(self._overlays[row], self._session.rows[row])

    def save_state(self, folder: Path) -> None:
        for name, array in zip(DTYPES, self.table, strict=True):
            np.save(folder / f"{name}.npy", array, allow_pickle=False)

    @classmethod
    def load_state(cls, folder: Path, config: Config, target: Target) -> Self:
        """Returns the drafter with memory-mapped arrays.

        Raises ValueError for a missing, truncated or invalid file, because the search does not check its indices.
        """
        arrays = [_load(folder / f"{name}.npy", dtype) for name, dtype in DTYPES.items()]
        invalid = _find_invalid(*arrays, vocab_size=target.vocab_size)
        if invalid is not None:
            raise ValueError(f"{folder / invalid}.npy does not fit the other arrays; the artifact must be made again")
        return cls(config, target, arrays)

    def _with_recent(self, overlay: "Overlay", ids: list[int]) -> "Overlay":
        """Returns the overlay with the tri-grams of the text's last tokens added."""
        config = self.config
        if not config.bump:
            return overlay
        recent_T = np.array(ids[-config.window :], dtype=np.int64)
        return self._compiled.add_trigrams(
            self.table, overlay, recent_T, self.target.vocab_size, config.bump, config.largest
        )

    def _tree(self, overlay: "Overlay", ids: list[int], budget: int) -> TokenTree:
        """Returns a row's tree, a single path for an encoder-decoder."""
        if len(ids) < 2:
            return TokenTree()
        before, pending = ids[-2:]
        tokens_N, parents_N, _, scores_N = self._search(overlay, before, pending, budget)
        tree = TokenTree(tokens=tokens_N[1:].tolist(), parents=parents_N[1:].tolist(), weights=scores_N[1:].tolist())
        return heaviest_nodes(tree, self.config.num_nodes)

    def _search(self, overlay: "Overlay", before: int, pending: int, budget: int) -> "Nodes":
        """Returns the paths found after two tokens, each with its likeliest successor."""
        config, compiled = self.config, self._compiled
        widest = max(self._widest, int(overlay.sizes[2]))
        trigrams = compiled.Trigrams(self.table, overlay, self.target.vocab_size, widest)
        depth = min(config.depth, budget)
        if config.maker == "greedy" or not self.target.takes_trees:
            return compiled.greedy_chain(trigrams, before, pending, min(depth + 1, budget))
        if config.maker == "full":
            nodes = compiled.likeliest_paths(trigrams, before, pending, depth, config.num_sequences)
        else:
            nodes = compiled.monte_carlo_search(
                trigrams,
                before,
                pending,
                depth,
                config.num_sequences,
                config.num_iterations,
                config.explore,
                config.explore_base,
                config.chance,
            )
        return compiled.extend_paths(trigrams, before, nodes, budget)


def _frozen(array: np.ndarray) -> np.ndarray:
    """Returns a read-only view of class np.ndarray, so that numba compiles for one type only."""
    view = array.view(np.ndarray)
    view.flags.writeable = False
    return view


def _load(file: Path, dtype: type) -> np.ndarray:
    array = load_array(file, mmap=True)
    if array.dtype != dtype or array.ndim != 1:
        raise ValueError(f"{file} holds {array.dtype}{list(array.shape)}; the artifact must be made again")
    return array


def _find_invalid(
    keys_K: np.ndarray, begins_K: np.ndarray, tokens_S: np.ndarray, weights_S: np.ndarray, *, vocab_size: int
) -> str | None:
    """Returns the name of the first array that does not fit the others, None if all fit."""
    # Comparisons, because differences of 64-bit numbers can overflow.
    if len(begins_K) != len(keys_K) + 1 or begins_K[0] != 0 or (begins_K[1:] <= begins_K[:-1]).any():
        return "begins"
    if (keys_K[1:] <= keys_K[:-1]).any() or (keys_K[:1] < 0).any() or (keys_K[-1:] >= vocab_size**2).any():
        return "keys"
    if len(tokens_S) != begins_K[-1] or ((tokens_S < 0) | (tokens_S >= vocab_size)).any():
        return "tokens"
    if len(weights_S) != len(tokens_S) or not ((weights_S > 0) & (weights_S <= 1)).all():
        return "weights"
    return None
