"""Prompt lookup: copies what followed the same n-gram earlier in the text (Saxena 2023, prompt-lookup-decoding)."""

from dataclasses import dataclass

from draftsmith.core import drafter
from draftsmith.core.drafter import Session, Step
from draftsmith.core.target import Target
from draftsmith.core.tree import Draft
from draftsmith.parts import trie


@dataclass(frozen=True, kw_only=True)
class Config:
    """Nothing is learnt; these settle what is copied."""

    max_ngram: int = 3
    """Longest run of last tokens looked for; shorter ones are tried down to `min_ngram`."""
    min_ngram: int = 1
    """Shortest run that may match."""
    num_draft: int = 10
    """Most tokens copied from one place; the second place gives half as many, the third a third."""
    num_continuations: int = 1
    """Places copied from at once, each followed by another token; more than one make a tree."""

    def __post_init__(self) -> None:
        if not 1 <= self.min_ngram <= self.max_ngram:
            raise ValueError(f"min_ngram {self.min_ngram} must be at least 1 and at most max_ngram {self.max_ngram}")
        for name in ("num_draft", "num_continuations"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")


class Drafter(drafter.Drafter):
    """Keeps, for each row, where each n-gram last ended, so that a look-up and an update take constant time."""

    serving_engines = ("vllm", "sglang")

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
            found = index.continuations(min(budget, self.config.num_draft))
            copied.append(found[:1] if self.target.is_encoder_decoder else found)
        return trie.to_draft(self._session, [trie.build_trie((tokens, 1.0) for tokens in found) for found in copied])

    def observe(self, step: Step) -> None:
        """Nothing to learn: the next `propose` reads the new tokens."""


class _Index:
    """One row's text, an encoder's source before it, and where each n-gram in it last came before each token."""

    def __init__(self, config: Config, source: list[int]) -> None:
        self._config = config
        self._ids = list(source)
        self._num_source = len(source)
        # Of the tokens that followed an n-gram the latest `num_continuations`, in the order in which they last did.
        self._ends: dict[tuple[int, ...], dict[int, int]] = {}
        self._num_indexed = 0

    def extend(self, row: list[int]) -> None:
        """Takes up the row's new tokens; n-grams that end before the last token become known."""
        ids, config = self._ids, self._config
        ids += row[len(ids) - self._num_source :]
        for end in range(self._num_indexed + 1, len(ids)):
            for size in range(config.min_ngram, min(config.max_ngram, end) + 1):
                ends = self._ends.setdefault(tuple(ids[end - size : end]), {})
                ends.pop(ids[end], None)
                ends[ids[end]] = end
                if len(ends) > config.num_continuations:
                    del ends[next(iter(ends))]
        self._num_indexed = max(self._num_indexed, len(ids) - 1)

    def continuations(self, num_tokens: int) -> list[list[int]]:
        """Returns what followed the longest matches, of equal ones the latest, no two beginning alike.

        A copy that meets the end of the text goes round.
        """
        ids, config = self._ids, self._config
        found: dict[int, int] = {}
        for size in range(min(config.max_ngram, len(ids) - 1), config.min_ngram - 1, -1):
            ends = self._ends.get(tuple(ids[len(ids) - size :]), {})
            for token, end in reversed(ends.items()):
                if len(found) < config.num_continuations:
                    found.setdefault(token, end)
        return [
            [ids[end + offset % (len(ids) - end)] for offset in range(num_tokens // place)]
            for place, end in enumerate(found.values(), start=1)
        ]
