"""Records every step of a few greedy texts: the draft tree, the accepted tokens, and the target's own token.

Decoding here is for the report and not timed: one prompt at a time, with the drafter's state reset before each.
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

NAME = "bakeoff"
"""Name of every file of a comparison."""
TEXTS = f"{NAME}.texts.json"
"""File of the recorded texts."""
NUM_TEXTS, NUM_TOKENS = 3, 64
MAX_PATHS, MAX_REJECTED = 24, 4
NodePath = tuple[int, ...]
"""A node of a draft tree, as the index among its siblings at each depth."""


class DraftRecorder(Drafter):
    """Wraps a drafter and keeps every draft, with the length of the text before it."""

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
    """One decoding step of a greedy text."""

    drafted: dict[NodePath, int]
    """Drafted tokens by their node in the tree."""
    path: NodePath
    """Node of the last accepted token; empty if none was accepted."""
    target_token: int | None
    """The target's token after the accepted ones; None if the text ended with a drafted token."""

    @property
    def accepted(self) -> list[int]:
        """Returns the accepted tokens."""
        return [self.drafted[self.path[: depth + 1]] for depth in range(len(self.path))]

    @property
    def rejected(self) -> list[int]:
        """Returns the tokens that were drafted for the position of the target's token."""
        depth = len(self.path) + 1
        return [token for path, token in self.drafted.items() if path[:-1] == self.path and len(path) == depth]


def record_texts(
    target: Target, prompts: Sequence[Prompt], drafters: Mapping[str, Any], max_new_tokens: int, config: Any = None
) -> dict[str, Any]:
    """Returns, as JSON data, the decoding steps of greedy texts after some of the prompts, and draft-tree statistics.

    Prompts are those of `select_prompts`; each text has at most `NUM_TOKENS` tokens. `config` is a generation config.
    """
    texts: list[dict[str, Any]] = []
    steps: dict[str, list[DecodingStep]] = {name: [] for name in drafters}
    selected = select_prompts(prompts)
    with tqdm(total=len(drafters) * len(selected), desc="texts", unit="text", leave=False, delay=2) as bar:
        for prompt in selected:
            by_drafter = {}
            for name, drafter in drafters.items():
                found = greedy_steps(drafter, prompt.ids, min(max_new_tokens, NUM_TOKENS), config=config)
                by_drafter[name] = _as_text(drafter.target, prompt.ids, found)
                steps[name] += found
                bar.update()
            prompt_text = prompt.text or "".join(_pieces(target, [], prompt.ids))
            texts.append({"prompt": prompt_text, "category": prompt.category, "steps": by_drafter})
    return {"texts": texts, "trees": {name: _tree_statistics(found) for name, found in steps.items()}}


def select_prompts(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Returns the first prompts, preferring different categories."""
    first: dict[str | None, Prompt] = {}
    for prompt in prompts:
        first.setdefault(prompt.category, prompt)
    ahead = list(first.values())
    return [*ahead, *(prompt for prompt in prompts if prompt not in ahead)][:NUM_TEXTS]


def greedy_steps(
    drafter: Any, prompt: list[int], max_new_tokens: int, *, length: str = "auto", config: Any = None
) -> list[DecodingStep]:
    """Returns the steps of greedy decoding after one prompt.

    `length` and `config` are `length` and `generation_config` of `draftsmith.generate`.
    """
    drafter.forget()
    recorder = DraftRecorder(with_length_control(drafter, length))
    ids = torch.tensor([prompt], device=drafter.target.device)
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": 0.0, "length": "fixed"}
    out = draftsmith.generate(drafter.target, ids, recorder, generation_config=config, **settings)
    text = out.sequences[0, : out.lengths[0]].tolist()
    ends = [length for length, _ in recorder.drafts[1:]] + [len(text)]
    steps = []
    for (begin, draft), end in zip(recorder.drafts, ends, strict=True):
        steps.append(_step_of(draft, text[begin:end]))
        done = begin + len(steps[-1].path) + 1
        # Steps with room for a single token draft nothing.
        steps += [DecodingStep(drafted={}, path=(), target_token=token) for token in text[done:end]]
    if not recorder.drafts:
        steps = [DecodingStep(drafted={}, path=(), target_token=token) for token in text[-max_new_tokens:]]
    return steps


def _step_of(draft: Draft, new: list[int]) -> DecodingStep:
    """Returns the step in which `draft` was verified and tokens `new` committed: the matching path was accepted."""
    num_nodes = draft.tree.num_nodes if draft.num_nodes is None else draft.num_nodes[0]
    tokens, parents = draft.tokens_BN[0].tolist(), draft.tree.parents_RN[0].tolist()
    paths: list[NodePath] = [()]
    num_children = [0] * num_nodes
    for node in range(1, num_nodes):
        parent = parents[node]
        paths.append((*paths[parent], num_children[parent]))
        num_children[parent] += 1
    drafted = dict(zip(paths[1:], tokens[1:num_nodes], strict=True))
    path: NodePath = ()
    for token in new:
        child = next((node for node, one in drafted.items() if node[:-1] == path and one == token), None)
        if child is None:
            break
        path = child
    target_token = new[len(path)] if len(path) < len(new) else None
    return DecodingStep(drafted=drafted, path=path, target_token=target_token)


def _as_text(target: Target, prompt: list[int], steps: Sequence[DecodingStep]) -> list[dict[str, Any]]:
    """Returns the steps with tokens decoded to text."""
    ids = [
        token
        for step in steps
        for token in (*step.accepted, *([] if step.target_token is None else [step.target_token]))
    ]
    pieces = iter(_pieces(target, [] if target.is_encoder_decoder else prompt, ids))
    return [
        {
            "accepted": [next(pieces) for _ in step.path],
            "own": None if step.target_token is None else next(pieces),
            "rejected": ["".join(_pieces(target, [], [token])) for token in step.rejected[:MAX_REJECTED]],
            "num_drafted": len(step.drafted),
        }
        for step in steps
    ]


def _pieces(target: Target, before: list[int], ids: list[int]) -> list[str]:
    """Returns the text that each token adds; "" for part of a character that a later token completes."""
    if target.tokenizer is None:
        return [f"{token} " for token in ids]
    decoded, pieces = target.tokenizer.decode(before), []
    for end in range(1, len(ids) + 1):
        text = target.tokenizer.decode([*before, *ids[:end]])
        whole = text if end == len(ids) else text.rstrip("\ufffd")
        pieces.append(whole[len(decoded) :])
        decoded = whole if len(whole) > len(decoded) else decoded
    return pieces


def _tree_statistics(steps: Sequence[DecodingStep]) -> dict[str, Any]:
    """Returns the number of times each tree node was drafted and accepted, for the most drafted nodes."""
    drafted: Counter[NodePath] = Counter(path for step in steps for path in step.drafted)
    accepted: Counter[NodePath] = Counter(step.path[: depth + 1] for step in steps for depth in range(len(step.path)))
    # A node is drafted at most as often as its parent; among equal counts the shorter path, the parent, comes first.
    most_drafted = sorted(drafted, key=lambda path: (-drafted[path], len(path), path))[:MAX_PATHS]
    nodes = [{"path": path, "drafted": drafted[path], "accepted": accepted[path]} for path in sorted(most_drafted)]
    return {"num_steps": len(steps), "num_nodes": sum(drafted.values()) / max(len(steps), 1), "nodes": nodes}
