"""A small drafter speculates for a larger one, which drafts for the target (staged speculation, 2308.04623).

The larger one is a model of its own: its chain is decoded as the target's text is, by drafting and lossless
verification, so that each of its tokens follows its law after those before, and to the target the chain is one drawn
token by token.

Shape suffixes: B rows, N nodes, P tokens of a path, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from draftsmith.core import drafter
from draftsmith.core.drafter import Session, Step
from draftsmith.core.stats import Stopwatch
from draftsmith.core.target import Target
from draftsmith.core.tree import Draft, chain
from draftsmith.length import policies
from draftsmith.parts.composites import (
    Part,
    PartConfigs,
    check_parts,
    forget_all,
    load_part,
    make_part,
    parameters_of,
    save_parts,
)
from draftsmith.verify import verify_draft


@dataclass(frozen=True, kw_only=True)
class Config:
    """The two drafters, and how long the larger one's chains are."""

    parts: PartConfigs
    """Family and configuration of the larger one, a draft model, and of the small one that drafts for it. Of the larger
    one's configuration the model alone matters."""
    num_draft: int = 8
    """Most tokens that the larger one drafts at a time."""
    length: str = "refit=0.4"
    """How long its chains are: a policy of draftsmith/length/policies.py, and its number; the small one keeps its own."""

    def __post_init__(self) -> None:
        check_parts(self.parts)
        if len(self.parts) != 2:
            raise ValueError(f"{len(self.parts)} parts are named; there must be two, the larger one first")
        if self.num_draft < 1:
            raise ValueError(f"num_draft is {self.num_draft}; it must be at least 1")
        policies.make(self.length)

    @property
    def supports_early_stop(self) -> bool:
        return True


class Drafter(drafter.Drafter):
    """The larger one's model with a cache of its own, decoding ahead of the target's text with the small one's help.

    What it has read and the target has not confirmed is taken back. A small one that defines no `rewind(lengths)` is
    begun anew at every draft: one that looks up the text's own past reads all of it again.
    """

    draft_model: Target
    keeps_state_between_calls = True

    def __init__(self, config: Config, target: Target, parts: Sequence[Part] | None = None) -> None:
        self.config = config
        self.target = target
        if parts is None:
            larger = make_part(config.parts[0], target)
            parts = [larger, make_part(config.parts[1], draft_model_of(larger))]
        self.parts = list(parts)
        self.draft_model = draft_model_of(self.parts[0])
        self._small = self.parts[1]
        if self._small.hidden_layers:
            raise ValueError(f"{self._small.name} reads hidden layers; the small drafter must go by the text alone")

    def save_state(self, folder: Path) -> None:
        save_parts(self.parts, folder)

    @classmethod
    def load_state(cls, folder: Path, config: Config, target: Target) -> Self:
        larger = load_part(folder, config.parts, 0, target)
        return cls(config, target, [larger, load_part(folder, config.parts, 1, draft_model_of(larger))])

    def parameters(self) -> Iterator[Tensor]:
        return parameters_of(self.parts)

    def forget(self) -> None:
        forget_all(self.parts)

    def start(self, session: Session) -> None:
        self._session = session
        # Of each row the ids that the larger one has read or drafted; the last one is not read yet.
        self._rows = [list(row) for row in session.rows]
        self._cache = self.draft_model.new_cache(len(self._rows))
        if max(map(len, self._rows)) > 1:
            self.draft_model.prefill([row[:-1] for row in self._rows], self._cache)
        self._inner = replace(session, target=self.draft_model, rows=self._rows, cache=self._cache, hidden={})
        self._small.start(self._inner)
        self._is_running = [True] * len(self._rows)

    def propose(self, budget: int) -> Draft:
        session = self._session
        most = min(budget, self.config.num_draft, self.draft_model.context_length - max(map(len, session.rows)))
        if most < 1:
            return session.empty_draft()
        self._return_to_text()
        laws: list[list[Tensor]] = [[] for _ in session.rows]
        ends = [len(row) + most if runs else 0 for row, runs in zip(session.rows, self._is_running, strict=True)]
        while any(len(row) < end for row, end in zip(self._rows, ends, strict=True)):
            self._advance(ends, laws)
        return self._draft(laws)

    def observe(self, step: Step) -> None:
        """Notes who goes on; the next draft sees what has become of the last."""
        self._is_running = [len(path) > 0 for path in step.paths]

    def _return_to_text(self) -> None:
        """Takes back what was drafted and not confirmed, and reads what was committed beside it."""
        cache, agreed = self._cache, []
        for drafted, committed in zip(self._rows, self._session.rows, strict=True):
            # The pending token is never read yet.
            agreed.append(_num_common(drafted, committed[:-1]))
            drafted[:] = committed
        cache.lengths = [min(pair) for pair in zip(cache.lengths, agreed, strict=True)]
        missing = [ids[known:-1] for ids, known in zip(self._rows, cache.lengths, strict=True)]
        if longest := max(map(len, missing)):
            device = self.draft_model.device
            missing_BT = torch.tensor([ids + [0] * (longest - len(ids)) for ids in missing], device=device)
            self.draft_model.forward(missing_BT, chain(longest, device), cache)
            cache.commit([list(range(len(ids))) for ids in missing])
        self._small.rewind(agreed)

    def _advance(self, ends: list[int], laws: list[list[Tensor]]) -> None:
        """Drafts for the larger one, verifies, and takes each row's tokens up to its entry of `ends`.

        A row that its policy stops has its end set to where it is. What was drawn past an end is dropped: where the end
        is depends on the tokens before it alone, so that these keep their law.
        """
        session, rows, cache = self._session, self._rows, self._cache
        watch = Stopwatch(self.draft_model.device)
        budget = max(end - len(row) for end, row in zip(ends, rows, strict=True)) - 1
        draft = self._small.propose(budget) if budget > 0 else self._inner.empty_draft()
        logits_BNV = self.draft_model.logits(self.draft_model.forward_draft(draft, cache).hidden_BND)
        verdict = verify_draft(logits_BNV, draft, session.sampling, "auto", session.generator)
        paths, next_tokens = verdict.to_host()
        tokens = draft.tokens_BN.tolist()
        for row, path in enumerate(paths):
            if len(rows[row]) >= ends[row]:
                path.clear()
                continue
            new = [*(tokens[row][node] for node in path[1:]), next_tokens[row]][: ends[row] - len(rows[row])]
            logits_PV = logits_BNV[row, path[: len(new)]]
            told_P = logits_PV.float().softmax(-1).gather(1, torch.tensor(new, device=logits_PV.device)[:, None])[:, 0]
            for number, confidence in enumerate(told_P.tolist(), start=1):
                if not session.should_continue(row, confidence):
                    del new[number:]
                    ends[row] = len(rows[row]) + number
                    break
            if not session.sampling.is_greedy:
                laws[row].append(session.sampling.probs(logits_PV[: len(new)]))
            rows[row] += new
        cache.commit(paths)
        # A row that ended within its path has read more than it took.
        cache.lengths = [min(known, len(row) - 1) for known, row in zip(cache.lengths, rows, strict=True)]
        step = Step(draft=draft, logits_BNV=logits_BNV, hidden={}, verdict=verdict, paths=paths, cost_ms=watch.lap_ms())
        self._small.observe(step)

    def _draft(self, laws: list[list[Tensor]]) -> Draft:
        """Returns the chains that were decoded, and the laws of their tokens."""
        device, committed = self.target.device, self._session.rows
        chains = [
            torch.tensor(ids[len(row) - 1 :], device=device) for ids, row in zip(self._rows, committed, strict=True)
        ]
        tokens_BN = pad_sequence(chains, batch_first=True)
        num_nodes = list(map(len, chains))
        settings: dict[str, Any] = {}
        if not self._session.sampling.is_greedy:
            some_1V = next(probs_PV[:1] for of_row in laws for probs_PV in of_row)
            # Rows that draft nothing, or less, are filled with any law.
            filled = [torch.cat([*of_row, some_1V]) for of_row in laws]
            longest = tokens_BN.shape[1] - 1
            probs_BNV = torch.stack([torch.cat([probs_PV, some_1V.expand(longest, -1)])[:longest] for probs_PV in filled])
            settings = {"draft_probs_BNV": probs_BNV, "sampling_scheme": "independent"}
        return Draft(
            tokens_BN=tokens_BN,
            tree=chain(tokens_BN.shape[1], device),
            num_nodes=num_nodes if min(num_nodes) < tokens_BN.shape[1] else None,
            **settings,
        )


def draft_model_of(part: Part) -> Target:
    """Returns the model that a part drafts with; raises ValueError if it has none of its own."""
    draft_model = part.drafter.draft_model
    if draft_model is None:
        raise ValueError(f"{part.name} has no model of its own that could be drafted for; name a draft model first")
    return draft_model


def _num_common(ids: Sequence[int], others: Sequence[int]) -> int:
    """Returns how many of the first ids are the same."""
    num_both = min(len(ids), len(others))
    return next((place for place in range(num_both) if ids[place] != others[place]), num_both)
