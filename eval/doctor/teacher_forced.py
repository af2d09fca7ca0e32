"""Teacher-forced drafts: accuracy of drafts that begin at positions of a text which the target wrote greedily.

The target's next tokens are known from the text, so no verification is needed: a draft is accepted as far as it matches
the text.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from draftsmith import Target
from draftsmith.core.drafter import Session
from draftsmith.core.sampling import Sampling
from draftsmith.core.stats import drafted_depth
from draftsmith.core.tree import Draft

BATCH_SIZE = 32
OFFSETS = (-2, -1, 0, 1, 2)


@dataclass(frozen=True, kw_only=True)
class GreedyText:
    """A prompt and the target's greedy continuation."""

    ids: list[int]
    """Token ids of both."""
    num_prompt: int
    """Number of prompt tokens."""


@dataclass(kw_only=True)
class DraftCounts:
    """Counts of drafted and accepted tokens over several drafts."""

    drafted: list[int] = field(default_factory=list)
    """Entry d counts the drafts that reached depth d + 1."""
    accepted: list[int] = field(default_factory=list)
    """Entry d counts the drafts accepted up to depth d + 1."""
    first_correct: dict[int, int] = field(default_factory=lambda: dict.fromkeys(OFFSETS, 0))
    """Number of drafts whose likeliest first token equals the text's token, by offset from its own position."""
    num_drafts: int = 0

    def add(self, num_drafted: int, num_accepted: int) -> None:
        """Adds one draft."""
        self.num_drafts += 1
        for counts, reached in ((self.drafted, num_drafted), (self.accepted, num_accepted)):
            counts.extend([0] * (num_drafted - len(counts)))
            for depth in range(reached):
                counts[depth] += 1

    def rates(self) -> list[float]:
        """Returns the acceptance rate at each depth, relative to the drafts that reached it."""
        return [part / whole for part, whole in zip(self.accepted, self.drafted, strict=True) if whole]

    def accuracy_at(self, offset: int) -> float:
        """Returns the accuracy of first tokens against the text at an offset from their position."""
        return self.first_correct[offset] / max(self.num_drafts, 1)


def draft_positions(texts: Sequence[GreedyText], most: int) -> list[tuple[int, int]]:
    """Returns (text, position) of the target's tokens: all of them, or at most `most` evenly spaced ones."""
    positions = [(number, end) for number, text in enumerate(texts) for end in range(text.num_prompt, len(text.ids))]
    step = max(1, -(-len(positions) // most))
    return positions[::step]


def draft_from_positions(
    target: Target,
    drafter: Any,
    texts: Sequence[GreedyText],
    positions: Sequence[tuple[int, int]],
    depth: int,
    *,
    shift: int = 0,
    on_progress: Callable[[int], Any] = lambda num_rows: None,
) -> DraftCounts:
    """Drafts up to `depth` tokens at each of `positions`, greedily, and returns their counts.

    With `shift`, the drafter gets the hidden layers that many blocks after those that it reads.
    """
    counts = DraftCounts()
    for begin in range(0, len(positions), BATCH_SIZE):
        part = positions[begin : begin + BATCH_SIZE]
        drafts = _draft(target, drafter, [texts[number].ids[:end] for number, end in part], depth, shift)
        tokens = drafts.tokens_BN.tolist()
        for row, (number, end) in enumerate(part):
            _count(counts, drafts, row, tokens[row], texts[number].ids, end)
        on_progress(len(part))
    return counts


@torch.inference_mode()
def _draft(target: Target, drafter: Any, rows: list[list[int]], depth: int, shift: int) -> Draft:
    drafter.forget()
    cache = target.new_cache(len(rows))
    layers = tuple(layer + shift for layer in drafter.hidden_layers)
    hidden = target.prefill([row[:-1] for row in rows], cache, layers=layers) if max(map(len, rows)) > 1 else {}
    session = Session(
        target=target,
        rows=[list(row) for row in rows],
        cache=cache,
        sampling=Sampling(temperature=0.0),
        generator=torch.Generator().manual_seed(0),
        hidden={layer: hidden[layer + shift] for layer in drafter.hidden_layers} if hidden else {},
    )
    drafter.start(session)
    return drafter.propose(depth)


def _count(counts: DraftCounts, drafts: Draft, row: int, tokens: list[int], text: list[int], end: int) -> None:
    """Adds one row's draft, cut at the end of the text, after which the target's tokens are unknown."""
    parents = drafts.tree.parents_RN[row % len(drafts.tree.parents_RN)].tolist()
    num_nodes = drafts.tree.num_nodes if drafts.num_nodes is None else drafts.num_nodes[row]
    reached, node = min(drafted_depth(drafts, row), len(text) - end), 0
    depth = 0
    while depth < reached:
        expected = text[end + depth]
        children = (n for n in range(node + 1, num_nodes) if parents[n] == node and tokens[n] == expected)
        node = next(children, -1)
        if node < 0:
            break
        depth += 1
    counts.add(reached, depth)
    first = next((n for n in range(1, num_nodes) if parents[n] == 0), None)
    for offset in OFFSETS:
        if first is not None and 0 <= end + offset < len(text):
            counts.first_correct[offset] += tokens[first] == text[end + offset]
