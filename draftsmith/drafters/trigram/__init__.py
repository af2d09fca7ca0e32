"""Trees of tokens that tend to follow the last two, found by Monte Carlo tree search (ADED, 2407.12021).

A store says how often a token followed two others in text of the target's own; each row adds to a copy of it what it
has said itself. Nothing is learnt by gradient, and the target's probabilities are not asked for.

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
from draftsmith.parts.trie import TokenTree, to_draft, heaviest_nodes

if TYPE_CHECKING:
    from draftsmith.drafters.trigram.compiled import Nodes, Overlay

MAKERS = ("mcts", "full", "greedy")
DTYPES = {"keys": np.int64, "begins": np.int64, "tokens": np.int32, "weights": np.float32}


@dataclass(frozen=True, kw_only=True)
class Config:
    """How drafts are searched for, and how fast a text's own habits count; the paper's constants by default."""

    maker: str = field(default="mcts", metadata={"choices": MAKERS})
    """What finds texts to draft: mcts (the paper's search), full (the likeliest of all), greedy (a single one)."""
    num_iterations: int = 150
    """Paths that mcts tries."""
    depth: int = 4
    """Tokens of the longest text; a draft has one more, each text's likeliest successor."""
    num_sequences: int = 24
    """Texts drafted, each counted with its beginnings."""
    num_nodes: int = 64
    """Most tokens drafted, the best of those texts."""
    explore: float = 32.0
    """How much a successor's weight counts against the rewards seen so far: c1 of the token preference score."""
    explore_base: float = 8.0
    """The larger, the later that rises with the number of visits: c2."""
    bump: float = 0.04
    """What each step adds to the weight of every tri-gram among a row's last `window` tokens; 0 learns nothing."""
    largest: float = 3.0
    """What such a weight rises to at most."""
    window: int = 16
    """Tokens of which the tri-grams count as recent."""
    chance: int = 0
    """Seed of the search's own chances: with the same tri-grams the same two tokens get the same draft."""

    def __post_init__(self) -> None:
        if self.maker not in MAKERS:
            raise ValueError(f"maker is {self.maker!r}; there are {', '.join(MAKERS)}")
        for name in ("num_iterations", "depth", "num_sequences", "num_nodes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("explore", "bump", "chance"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must not be negative")
        for name in ("explore_base", "largest"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be positive")
        if self.window < 3:
            raise ValueError(f"window is {self.window}; it must hold a tri-gram")


class Drafter(drafter.Drafter):
    """The store, and for each row of a call what its own text has added to it."""

    serving_engines = ("vllm",)

    def __init__(self, config: Config, target: Target, table: Sequence[np.ndarray] = ()) -> None:
        try:
            from draftsmith.drafters.trigram import compiled
        except ImportError as error:
            raise ValueError("this drafter's search needs numba: pip install 'draftsmith[compiled]'") from error
        self.config = config
        self.target = target
        self._compiled = compiled
        empty = [np.zeros(int(name == "begins"), dtype) for name, dtype in DTYPES.items()]
        self.table = compiled.Table(*map(_frozen, table or empty))
        self._widest = int(np.diff(self.table.begins_K).max(initial=0))
        # The first call of what is compiled takes seconds, which no text shall wait for.
        self._nodes(self._learnt(compiled.new_overlay(), [0, 0, 0]), 0, 0, 1)

    def start(self, session: Session) -> None:
        self._session = session
        self._overlays = [self._learnt(self._compiled.new_overlay(), ids) for ids in session.rows]
        self._is_running = [True] * len(session.rows)

    def propose(self, budget: int) -> Draft:
        rows = zip(self._overlays, self._session.rows, self._is_running, strict=True)
        return to_draft(
            self._session, [self._branches(overlay, ids, budget) if runs else TokenTree() for overlay, ids, runs in rows]
        )

    def observe(self, step: Step) -> None:
        """What a row has committed is learnt, whoever drafted it."""
        for row, path in enumerate(step.paths):
            self._is_running[row] = len(path) > 0
            if path:
                self._overlays[row] = self._learnt(self._overlays[row], self._session.rows[row])

    def save_state(self, folder: Path) -> None:
        for name, array in zip(DTYPES, self.table, strict=True):
            np.save(folder / f"{name}.npy", array, allow_pickle=False)

    @classmethod
    def load_state(cls, folder: Path, config: Config, target: Target) -> Self:
        """Returns the drafter whose arrays stay in their files, read where they are needed.

        Raises ValueError for a file that is missing, truncated or odd: the search trusts what they hold.
        """
        arrays = [_mapped(folder / f"{name}.npy", dtype) for name, dtype in DTYPES.items()]
        odd = _odd(*arrays, vocab_size=target.vocab_size)
        if odd is not None:
            raise ValueError(f"{folder / odd}.npy does not fit the rest of the store; the artifact must be made again")
        return cls(config, target, arrays)

    def _learnt(self, overlay: "Overlay", ids: list[int]) -> "Overlay":
        """Returns what a row's text has added, its last tokens counted once more."""
        config = self.config
        if not config.bump:
            return overlay
        recent_T = np.array(ids[-config.window :], dtype=np.int64)
        return self._compiled.learn(self.table, overlay, recent_T, self.target.vocab_size, config.bump, config.largest)

    def _branches(self, overlay: "Overlay", ids: list[int], budget: int) -> TokenTree:
        """Returns a row's tree; a single branch for an encoder-decoder, which verifies nothing else."""
        if len(ids) < 2:
            return TokenTree()
        before, pending = ids[-2:]
        tokens_N, parents_N, _, scores_N = self._nodes(overlay, before, pending, budget)
        branches = TokenTree(tokens=tokens_N[1:].tolist(), parents=parents_N[1:].tolist(), weights=scores_N[1:].tolist())
        return heaviest_nodes(branches, self.config.num_nodes)

    def _nodes(self, overlay: "Overlay", before: int, pending: int, budget: int) -> "Nodes":
        """Returns the texts that are found to follow two tokens, each with its likeliest successor."""
        config, compiled = self.config, self._compiled
        widest = max(self._widest, int(overlay.sizes[2]))
        known = compiled.Known(self.table, overlay, self.target.vocab_size, widest)
        depth = min(config.depth, budget)
        if config.maker == "greedy" or not self.target.takes_trees:
            return compiled.chain(known, before, pending, min(depth + 1, budget))
        if config.maker == "full":
            nodes = compiled.likeliest(known, before, pending, depth, config.num_sequences)
        else:
            nodes = compiled.searched(
                known,
                before,
                pending,
                depth,
                config.num_sequences,
                config.num_iterations,
                config.explore,
                config.explore_base,
                config.chance,
            )
        return compiled.lengthened(known, before, nodes, budget)


def _frozen(array: np.ndarray) -> np.ndarray:
    """Returns a view that cannot be written to, of no class but numpy's own: one kind for the compiler."""
    view = array.view(np.ndarray)
    view.flags.writeable = False
    return view


def _mapped(file: Path, dtype: type) -> np.ndarray:
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(
            f"{file} is missing, truncated or no array ({error}); the artifact must be made again"
        ) from error
    if array.dtype != dtype or array.ndim != 1:
        raise ValueError(f"{file} holds {array.dtype}{list(array.shape)}; the artifact must be made again")
    return array


def _odd(
    keys_K: np.ndarray, begins_K: np.ndarray, tokens_S: np.ndarray, weights_S: np.ndarray, *, vocab_size: int
) -> str | None:
    """Returns the name of the first array that the others do not fit, None if all is well."""
    if len(begins_K) != len(keys_K) + 1 or begins_K[0] != 0 or (np.diff(begins_K) < 1).any():
        return "begins"
    if (np.diff(keys_K) < 1).any() or (keys_K[:1] < 0).any() or (keys_K[-1:] >= vocab_size**2).any():
        return "keys"
    if len(tokens_S) != begins_K[-1] or ((tokens_S < 0) | (tokens_S >= vocab_size)).any():
        return "tokens"
    if len(weights_S) != len(tokens_S) or not ((weights_S > 0) & (weights_S <= 1)).all():
        return "weights"
    return None
