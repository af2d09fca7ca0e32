"""Staged speculation (2308.04623): a small drafter drafts for a larger draft model, which drafts for the target.

The draft model decodes its chain as the target decodes its text, by drafting and lossless verification: each token
follows the draft model's distribution after those before, so that the target can verify the chain as a sampled one.

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
from draftsmith.core.target import Target
from draftsmith.core.tree import Draft, chain
from draftsmith.length import policies
from draftsmith.length.costs import Stopwatch
from draftsmith.parts.checks import MAX_NODES, check_at_least
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
from draftsmith.parts.suffix_array import num_common
from draftsmith.verify import verify_draft


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the two stages."""

    parts: PartConfigs
    """Family and configuration of the draft model and of the small drafter that drafts for it. Of the first only the
    model is used, not its drafting settings."""
    num_draft: int = 8
    """Maximum number of tokens that the draft model drafts per round."""
    length: str = "refit=0.4"
    """Draft-length policy of the draft model (draftsmith/length/policies.py); the small drafter has its own."""

    def __post_init__(self) -> None:
        check_parts(self.parts)
        if len(self.parts) != 2:
            raise ValueError(f"{len(self.parts)} parts given; there must be two, the draft model first")
        check_at_least(self, 1, "num_draft", most=MAX_NODES)
        policies.make(self.length)

    @property
    def supports_early_stop(self) -> bool:
        return True


class Drafter(drafter.Drafter):
    """The draft model with a cache of its own, decoding ahead of the target with the small drafter's help.

    Before each draft both are rewound to the committed text. A small drafter that cannot rewind starts again each time:
    one that looks up the text's own past reads all of it again.
    """

    has_draft_model = True
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
            raise ValueError(f"{self._small.name} reads hidden layers; the small drafter must read the text alone")

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
        # Each row's tokens that the draft model has processed or drafted; the last one is not processed yet.
        self._rows = [list(row) for row in session.rows]
        self._cache = self.draft_model.new_cache(len(self._rows))
        if max(map(len, self._rows)) > 1:
            self.draft_model.prefill([row[:-1] for row in self._rows], self._cache)
        noise = session.noise.following(self._rows) if session.noise is not None else None
        self._inner = replace(
            session, target=self.draft_model, rows=self._rows, cache=self._cache, hidden={}, noise=noise
        )
        self._small.start(self._inner)
        self._is_running = [True] * len(self._rows)

    def propose(self, budget: int) -> Draft:
        session = self._session
        most = min(budget, self.config.num_draft, self.draft_model.context_length - max(map(len, session.rows)))
        if most < 1:
            return session.empty_draft()
        self._rewind_to_committed()
        probs: list[list[Tensor]] = [[] for _ in session.rows]
        ends = [len(row) + most if runs else 0 for row, runs in zip(session.rows, self._is_running, strict=True)]
        while any(len(row) < end for row, end in zip(self._rows, ends, strict=True)):
            self._advance(ends, probs)
        return self._chains(probs)

    def observe(self, step: Step) -> None:
        """Notes which rows are running; the next `propose` reads the committed text."""
        self._is_running = [len(path) > 0 for path in step.paths]

    def _rewind_to_committed(self) -> None:
        """Drops drafted tokens that were rejected, and processes those that were committed instead."""
        cache, agreed = self._cache, []
        for drafted, committed in zip(self._rows, self._session.rows, strict=True):
            # The pending token has never been processed yet.
            agreed.append(num_common(drafted, committed[:-1]))
            drafted[:] = committed
        cache.lengths = [min(pair) for pair in zip(cache.lengths, agreed, strict=True)]
        missing = [ids[known:-1] for ids, known in zip(self._rows, cache.lengths, strict=True)]
        if longest := max(map(len, missing)):
            device = self.draft_model.device
            missing_BT = torch.tensor([ids + [0] * (longest - len(ids)) for ids in missing], device=device)
            self.draft_model.forward(missing_BT, chain(longest, device), cache)
            cache.commit([list(range(len(ids))) for ids in missing])
        self._small.rewind(agreed)

    def _advance(self, ends: list[int], probs: list[list[Tensor]]) -> None:
        """Decodes one round of the draft model with the small drafter, up to length `ends[row]` of each row.

        A row that its policy stops gets its current length as its end. Tokens sampled past an end are dropped: the end
        depends on the tokens before it only, so that these keep their distribution.
        """
        session, rows, cache = self._session, self._rows, self._cache
        watch = Stopwatch(self.draft_model.device)
        budget = max(end - len(row) for end, row in zip(ends, rows, strict=True)) - 1
        draft = self._small.propose(budget) if budget > 0 else self._inner.empty_draft()
        logits_BNV = self.draft_model.logits(self.draft_model.forward_draft(draft, cache).hidden_BND)
        verdict = verify_draft(logits_BNV, draft, session.sampling, "auto", session.generator, self._inner.noise)
        paths, next_tokens = verdict.to_host()
        tokens, decoded = draft.tokens_BN.tolist(), []
        for row, path in enumerate(paths):
            if len(rows[row]) >= ends[row]:
                path.clear()
            found = [*(tokens[row][node] for node in path[1:]), next_tokens[row]] if path else []
            decoded.append(found[: ends[row] - len(rows[row])])
        longest = max(map(len, decoded))
        nodes_BP, new_BP = (
            torch.tensor([ids[:longest] + [0] * (longest - len(ids)) for ids in one], device=logits_BNV.device)
            for one in (paths, decoded)
        )
        logits_BPV = logits_BNV[torch.arange(len(rows), device=logits_BNV.device)[:, None], nodes_BP]
        confidences = logits_BPV.float().softmax(-1).gather(2, new_BP[..., None])[..., 0].tolist()
        probs_BPV = session.sampling.probs(logits_BPV) if not session.sampling.is_greedy else None
        for row, new in enumerate(decoded):
            for number, confidence in enumerate(confidences[row][: len(new)], start=1):
                if not session.should_continue(row, confidence):
                    del new[number:]
                    ends[row] = len(rows[row]) + number
                    break
            if probs_BPV is not None and new:
                probs[row].append(probs_BPV[row, : len(new)])
            rows[row] += new
        cache.commit(paths)
        # The cache of a row that ended within its path holds more tokens than the row.
        cache.lengths = [min(known, len(row) - 1) for known, row in zip(cache.lengths, rows, strict=True)]
        step = Step(draft=draft, logits_BNV=logits_BNV, hidden={}, verdict=verdict, paths=paths, cost_ms=watch.lap_ms())
        self._small.observe(step)

    def _chains(self, probs: list[list[Tensor]]) -> Draft:
        """Returns the decoded chains with the distributions that their tokens were sampled from."""
        device, committed = self.target.device, self._session.rows
        chains = [
            torch.tensor(ids[len(row) - 1 :], device=device) for ids, row in zip(self._rows, committed, strict=True)
        ]
        tokens_BN = pad_sequence(chains, batch_first=True)
        num_nodes = list(map(len, chains))
        settings: dict[str, Any] = {}
        if not self._session.sampling.is_greedy:
            # Rows with shorter drafts are padded with any distribution.
            any_1V = next(probs_PV[:1] for of_row in probs for probs_PV in of_row)
            longest = tokens_BN.shape[1] - 1
            padding_NV = any_1V.expand(longest, -1)
            probs_BNV = torch.stack([torch.cat([*of_row, padding_NV])[:longest] for of_row in probs])
            settings = {"draft_probs_BNV": probs_BNV, "sampling_scheme": "independent"}
        return Draft(
            tokens_BN=tokens_BN,
            tree=chain(tokens_BN.shape[1], device),
            num_nodes=num_nodes if min(num_nodes) < tokens_BN.shape[1] else None,
            **settings,
        )


def draft_model_of(part: Part) -> Target:
    """Returns the draft model of a part; raises ValueError if it has none."""
    draft_model = part.drafter.draft_model
    if draft_model is None:
        raise ValueError(f"{part.name} has no draft model; the first part must be a drafter with a draft model")
    if draft_model.is_recurrent:
        raise ValueError(f"the draft model of {part.name} has recurrent layers, whose state cannot be set back")
    return draft_model
