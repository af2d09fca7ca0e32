"""Drafts begun afresh within a text that the target wrote: what a drafter says where all before it is right.

Of a greedy text the target's own next tokens are known, so that nothing need be verified: a draft is accepted as far as
the text holds it.
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

AT_ONCE = 32
OFFSETS = (-2, -1, 0, 1, 2)


@dataclass(frozen=True, kw_only=True)
class GreedyText:
    """A prompt and what the target greedily wrote after it."""

    ids: list[int]
    """All tokens."""
    num_prompt: int
    """How many of them are the prompt's."""


@dataclass(kw_only=True)
class DraftCounts:
    """What drafts came to, summed."""

    drafted: list[int] = field(default_factory=list)
    """Entry d counts the drafts that reached depth d + 1."""
    accepted: list[int] = field(default_factory=list)
    """Entry d counts those accepted to depth d + 1."""
    first_right: dict[int, int] = field(default_factory=lambda: dict.fromkeys(OFFSETS, 0))
    """How often the likeliest first token was the text's, so many places after the one it was meant for."""
    num_drafts: int = 0

    def add(self, num_drafted: int, num_accepted: int) -> None:
        self.num_drafts += 1
        for counts, reached in ((self.drafted, num_drafted), (self.accepted, num_accepted)):
            counts.extend([0] * (num_drafted - len(counts)))
            for depth in range(reached):
                counts[depth] += 1

    def shares(self) -> list[float]:
        """Returns, of the drafts that reached each depth, the share accepted to it."""
        return [part / whole for part, whole in zip(self.accepted, self.drafted, strict=True) if whole]

    def right_at(self, offset: int) -> float:
        return self.first_right[offset] / max(self.num_drafts, 1)


def draft_positions(texts: Sequence[GreedyText], most: int) -> list[tuple[int, int]]:
    """Returns (text, length of what stands before), every place written by the target, or `most` of them evenly."""
    places = [(number, end) for number, text in enumerate(texts) for end in range(text.num_prompt, len(text.ids))]
    step = max(1, -(-len(places) // most))
    return places[::step]


def draft_from_positions(
    target: Target,
    drafter: Any,
    texts: Sequence[GreedyText],
    places: Sequence[tuple[int, int]],
    depth: int,
    *,
    shift: int = 0,
    on_progress: Callable[[int], Any] = lambda num_rows: None,
) -> DraftCounts:
    """Returns what came of a draft of at most `depth` tokens begun at each of `places`, greedily.

    With `shift` the drafter is given hidden layers so many blocks later than those that it asks for.
    """
    counts = DraftCounts()
    for begin in range(0, len(places), AT_ONCE):
        part = places[begin : begin + AT_ONCE]
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
    """Adds one row's draft; no deeper than the text goes on, as what came after is not known."""
    parents = drafts.tree.parents_RN[row % len(drafts.tree.parents_RN)].tolist()
    num_nodes = drafts.tree.num_nodes if drafts.num_nodes is None else drafts.num_nodes[row]
    reached, node = min(drafted_depth(drafts, row), len(text) - end), 0
    depth = 0
    while depth < reached:
        said = text[end + depth]
        children = (n for n in range(node + 1, num_nodes) if parents[n] == node and tokens[n] == said)
        node = next(children, -1)
        if node < 0:
            break
        depth += 1
    counts.add(reached, depth)
    first = next((n for n in range(1, num_nodes) if parents[n] == 0), None)
    for offset in OFFSETS:
        if first is not None and 0 <= end + offset < len(text):
            counts.first_right[offset] += tokens[first] == text[end + offset]
