"""Prompt lookup: copies what followed the same n-gram earlier in the text (Saxena 2023, prompt-lookup-decoding)."""

from dataclasses import dataclass

import torch

from draftsmith.drafters import Session, Step
from draftsmith.target import Target
from draftsmith.tree import Draft, chain


@dataclass(frozen=True, kw_only=True)
class Config:
    """Nothing is learnt; these settle what is copied."""

    max_ngram: int = 3
    """Longest run of last tokens looked for; shorter ones are tried down to `min_ngram`."""
    min_ngram: int = 1
    """Shortest run that may match."""
    num_draft: int = 10
    """Most tokens copied."""

    def __post_init__(self) -> None:
        if not 1 <= self.min_ngram <= self.max_ngram:
            raise ValueError(f"min_ngram {self.min_ngram} must be at least 1 and at most max_ngram {self.max_ngram}")
        if self.num_draft < 1:
            raise ValueError(f"num_draft is {self.num_draft}; it must be at least 1")


class Drafter:
    """Keeps, for each row, where each n-gram last ended, so that a look-up and an update take constant time."""

    hidden_layers: tuple[int, ...] = ()

    def __init__(self, config: Config, target: Target) -> None:
        self.config = config
        self.target = target

    def start(self, session: Session) -> None:
        self._session = session
        sources: list[list[int]] = [[] for _ in session.rows]
        if session.source is not None:
            mask = session.source.mask_BT.bool()
            sources = [ids[kept].tolist() for ids, kept in zip(session.source.tokens_BT, mask, strict=True)]
        self._rows = [_Index(self.config, source) for source in sources]

    def propose(self, budget: int) -> Draft:
        copied = []
        for index, row in zip(self._rows, self._session.rows, strict=True):
            index.extend(row)
            copied.append(index.continuation(min(budget, self.config.num_draft)))
        longest = max(map(len, copied))
        tokens = [
            [row[-1], *ids, *[0] * (longest - len(ids))] for row, ids in zip(self._session.rows, copied, strict=True)
        ]
        device = self._session.target.device
        return Draft(
            tokens_BN=torch.tensor(tokens, device=device),
            tree=chain(longest + 1, device),
            num_nodes=[len(ids) + 1 for ids in copied],
        )

    def observe(self, step: Step) -> None:
        """Nothing to learn: the next `propose` reads the new tokens."""


class _Index:
    """One row's text, an encoder's source before it, and where each n-gram in it was last followed by something."""

    def __init__(self, config: Config, source: list[int]) -> None:
        self._config = config
        self._ids = list(source)
        self._num_source = len(source)
        self._ends: dict[tuple[int, ...], int] = {}
        self._num_indexed = 0

    def extend(self, row: list[int]) -> None:
        """Takes up the row's new tokens; n-grams that end before the last token become known."""
        self._ids += row[len(self._ids) - self._num_source :]
        for end in range(self._num_indexed + 1, len(self._ids)):
            for size in range(self._config.min_ngram, min(self._config.max_ngram, end) + 1):
                self._ends[tuple(self._ids[end - size : end])] = end
        self._num_indexed = max(self._num_indexed, len(self._ids) - 1)

    def continuation(self, num_tokens: int) -> list[int]:
        """Returns what followed the longest matching n-gram's latest occurrence, going round if it meets the end."""
        ids = self._ids
        for size in range(min(self._config.max_ngram, len(ids) - 1), self._config.min_ngram - 1, -1):
            end = self._ends.get(tuple(ids[len(ids) - size :]))
            if end is not None:
                period = len(ids) - end
                return [ids[end + offset % period] for offset in range(num_tokens)]
        return []
