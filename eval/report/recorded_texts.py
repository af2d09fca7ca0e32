"""What drafters did at every step of a few greedy texts: what they drafted, and what the target made of it.

Decoded to be read, not timed: one prompt after the other, by drafters that know nothing of earlier ones.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

import draftsmith
from data.prompts import Prompt
from draftsmith import Target
from draftsmith.core.drafter import Drafter, Session, Step
from draftsmith.core.tree import Draft
from draftsmith.length.controller import with_length_control

NUM_TEXTS, NUM_TOKENS = 3, 64
MOST_PATHS, MOST_REJECTED = 24, 4
Path = tuple[int, ...]
"""A node of a draft: at each depth, which of its siblings, from 0, leads there."""


class DraftRecorder(Drafter):
    """A drafter of which every draft is kept, with the length of the text that it continues."""

    def __init__(self, drafter: Any) -> None:
        self.config, self.target, self.hidden_layers = drafter.config, drafter.target, drafter.hidden_layers
        self.drafts: list[tuple[int, Draft]] = []
        self._drafter = drafter

    def start(self, session: Session) -> None:
        self._rows = session.rows
        self._drafter.start(session)

    def propose(self, budget: int) -> Draft:
        draft = self._drafter.propose(budget)
        self.drafts.append((len(self._rows[0]), draft))
        return draft

    def observe(self, step: Step) -> None:
        self._drafter.observe(step)


@dataclass(frozen=True, kw_only=True)
class DecodingStep:
    """One step of a greedy text."""

    drafted: dict[Path, int]
    """The tokens drafted, by their places in the tree."""
    path: Path
    """Where the accepted ones end; empty if none was."""
    own: int | None
    """The target's own token after them; None where the text ended in a drafted one."""

    @property
    def accepted(self) -> list[int]:
        return [self.drafted[self.path[: depth + 1]] for depth in range(len(self.path))]

    @property
    def rejected(self) -> list[int]:
        """What was drafted in place of the target's own token."""
        place = len(self.path)
        return [token for path, token in self.drafted.items() if path[:-1] == self.path and len(path) == place + 1]


def record_texts(
    target: Target, prompts: Sequence[Prompt], drafters: Mapping[str, Any], max_new_tokens: int
) -> dict[str, Any]:
    """Returns what JSON holds of greedy texts after `chosen(prompts)`, step by step, and of the trees drafted there.

    At most `NUM_TOKENS` tokens are written to each.
    """
    texts: list[dict[str, Any]] = []
    steps: dict[str, list[DecodingStep]] = {name: [] for name in drafters}
    with tqdm(total=len(drafters) * len(chosen(prompts)), desc="texts", unit="text", leave=False, delay=2) as bar:
        for prompt in chosen(prompts):
            by_drafter = {}
            for name, drafter in drafters.items():
                found = greedy_steps(drafter, prompt.ids, min(max_new_tokens, NUM_TOKENS))
                by_drafter[name] = _as_text(drafter.target, prompt.ids, found)
                steps[name] += found
                bar.update()
            shown = prompt.text or "".join(_pieces(target, [], prompt.ids))
            texts.append({"prompt": shown, "category": prompt.category, "steps": by_drafter})
    return {"texts": texts, "trees": {name: _tree_statistics(found) for name, found in steps.items()}}


def chosen(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Returns the first prompts, of categories as different as there are."""
    first: dict[str | None, Prompt] = {}
    for prompt in prompts:
        first.setdefault(prompt.category, prompt)
    ahead = list(first.values())
    return [*ahead, *(prompt for prompt in prompts if prompt not in ahead)][:NUM_TEXTS]


def greedy_steps(drafter: Any, prompt: list[int], max_new_tokens: int, *, length: str = "auto") -> list[DecodingStep]:
    """Returns the steps of greedy decoding after one prompt; `length` is as `draftsmith.generate` takes it."""
    drafter.forget()
    recorded = DraftRecorder(with_length_control(drafter, length))
    ids = torch.tensor([prompt], device=drafter.target.device)
    out = draftsmith.generate(drafter.target, ids, recorded, max_new_tokens=max_new_tokens, length="fixed")
    text = out.sequences[0, : out.lengths[0]].tolist()
    ends = [length for length, _ in recorded.drafts[1:]] + [len(text)]
    steps = []
    for (begin, draft), end in zip(recorded.drafts, ends, strict=True):
        steps.append(_step_of(draft, text[begin:end]))
        done = begin + len(steps[-1].path) + 1
        # Where one token more may be written nothing is drafted.
        steps += [DecodingStep(drafted={}, path=(), own=token) for token in text[done:end]]
    if not recorded.drafts:
        steps = [DecodingStep(drafted={}, path=(), own=token) for token in text[-max_new_tokens:]]
    return steps


def _step_of(draft: Draft, new: list[int]) -> DecodingStep:
    """Returns what became of a draft after which the text goes on with `new`: greedily, as far as it holds that."""
    num_nodes = draft.tree.num_nodes if draft.num_nodes is None else draft.num_nodes[0]
    tokens, parents = draft.tokens_BN[0].tolist(), draft.tree.parents_RN[0].tolist()
    paths: list[Path] = [()]
    num_children = [0] * num_nodes
    for node in range(1, num_nodes):
        parent = parents[node]
        paths.append((*paths[parent], num_children[parent]))
        num_children[parent] += 1
    drafted = dict(zip(paths[1:], tokens[1:num_nodes], strict=True))
    path: Path = ()
    for token in new:
        at = next((one for one, said in drafted.items() if one[:-1] == path and said == token), None)
        if at is None:
            break
        path = at
    own = new[len(path)] if len(path) < len(new) else None
    return DecodingStep(drafted=drafted, path=path, own=own)


def _as_text(target: Target, prompt: list[int], steps: Sequence[DecodingStep]) -> list[dict[str, Any]]:
    """Returns the steps with tokens as text."""
    ids = [token for step in steps for token in (*step.accepted, *([] if step.own is None else [step.own]))]
    pieces = iter(_pieces(target, [] if target.is_encoder_decoder else prompt, ids))
    return [
        {
            "accepted": [next(pieces) for _ in step.path],
            "own": None if step.own is None else next(pieces),
            "rejected": ["".join(_pieces(target, [], [token])) for token in step.rejected[:MOST_REJECTED]],
            "num_drafted": len(step.drafted),
        }
        for step in steps
    ]


def _pieces(target: Target, before: list[int], ids: list[int]) -> list[str]:
    """Returns what each token adds to the text; nothing, if it is only part of a character that a later one ends."""
    if target.tokenizer is None:
        return [f"{token} " for token in ids]
    read, found = target.tokenizer.decode(before), []
    for end in range(1, len(ids) + 1):
        text = target.tokenizer.decode([*before, *ids[:end]])
        whole = text if end == len(ids) else text.rstrip("\ufffd")
        found.append(whole[len(read) :])
        read = whole if len(whole) > len(read) else read
    return found


def _tree_statistics(steps: Sequence[DecodingStep]) -> dict[str, Any]:
    """Returns how often each place of the trees was drafted, and how often the text went there."""
    drafted: Counter[Path] = Counter(path for step in steps for path in step.drafted)
    accepted: Counter[Path] = Counter(step.path[: depth + 1] for step in steps for depth in range(len(step.path)))
    # A node is drafted no oftener than its parent, which of equals comes first by its length.
    often = sorted(drafted, key=lambda path: (-drafted[path], len(path), path))[:MOST_PATHS]
    nodes = [{"path": path, "drafted": drafted[path], "accepted": accepted[path]} for path in sorted(often)]
    return {"num_steps": len(steps), "num_nodes": sum(drafted.values()) / max(len(steps), 1), "nodes": nodes}
