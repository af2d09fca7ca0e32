"""Prompt lookup: copies what followed the same n-gram earlier in the text (Saxena 2023, prompt-lookup-decoding)."""

from dataclasses import dataclass

from draftsmith.core import drafter
from draftsmith.core.drafter import Session, Step
from draftsmith.core.target import Target
from draftsmith.core.tree import Draft
from draftsmith.parts.checks import MAX_NODES, check_at_least
from draftsmith.parts.retrieval import source_tokens
from draftsmith.parts.trie import build_trie, to_draft


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the look-up; nothing is trained."""

    max_ngram: int = 3
    """Length of the longest n-gram looked up; shorter ones are tried down to `min_ngram`."""
    min_ngram: int = 1
    """Length of the shortest n-gram looked up."""
    num_draft: int = 10
    """Maximum number of tokens copied from the best match; the second gives half as many, the third a third."""
    num_continuations: int = 1
    """Number of matches, followed by different tokens, that are copied from; more than one make a tree."""

    earliest: bool = False
    """Copy what followed the earliest of equally long matches, up to the end of the text, as vLLM and transformers do;
    otherwise the latest."""

    def __post_init__(self) -> None:
        if not 1 <= self.min_ngram <= self.max_ngram:
            raise ValueError(f"min_ngram {self.min_ngram} must be at least 1 and at most max_ngram {self.max_ngram}")
        check_at_least(self, 1, "num_draft", "num_continuations", "max_ngram", most=MAX_NODES)
        if self.earliest and self.num_continuations > 1:
            raise ValueError(f"num_continuations is {self.num_continuations}; with earliest it must be 1")


class Drafter(drafter.Drafter):
    """Indexes each row's n-grams by the positions after them, so that look-ups and updates take constant time."""

    row_state = ("_rows",)
    serving_engines = ("vllm", "sglang", "llama.cpp", "openvino")

    def __init__(self, config: Config, target: Target) -> None:
        self.config = config
        self.target = target

    def start(self, session: Session) -> None:
        self._session = session
        self._rows = [_Index(self.config, source) for source in source_tokens(session)]

    def propose(self, budget: int) -> Draft:
        copied = []
        for index, row in zip(self._rows, self._session.rows, strict=True):
            index.extend(row)
            found = index.continuations(min(budget, self.config.num_draft))
            copied.append(found[:1] if self.target.is_encoder_decoder else found)
        return to_draft(self._session, [build_trie((tokens, 1.0) for tokens in found) for found in copied])

    def observe(self, step: Step) -> None:
        """Does nothing: the next `propose` reads the new tokens."""


class _Index:
    """One row's text, after its source if there is one, and by n-gram the latest position after it of each token.

    With `earliest` it is the first position after the n-gram.
    """

    def __init__(self, config: Config, source: list[int]) -> None:
        self._config = config
        self._ids = list(source)
        self._num_source = len(source)
        # The latest `num_continuations` tokens after each n-gram, and their positions, in order of the latter.
        self._ends: dict[tuple[int, ...], dict[int, int]] = {}
        self._num_indexed = 0

    def extend(self, row: list[int]) -> None:
        """Adds the row's new tokens and indexes the n-grams that end before the last token."""
        ids, config = self._ids, self._config
        ids += row[len(ids) - self._num_source :]
        for end in range(self._num_indexed + 1, len(ids)):
            for size in range(config.min_ngram, min(config.max_ngram, end) + 1):
                ends = self._ends.setdefault(tuple(ids[end - size : end]), {})
                if config.earliest and ends:
                    continue
                ends.pop(ids[end], None)
                ends[ids[end]] = end
                if len(ends) > config.num_continuations:
                    del ends[next(iter(ends))]
        self._num_indexed = max(self._num_indexed, len(ids) - 1)

    def continuations(self, num_tokens: int) -> list[list[int]]:
        """Returns what followed the longest matches, the latest first if equally long, with different first tokens.

        A copy that reaches the end of the text continues with its own beginning, unless it is of the earliest match.
        """
        ids, config = self._ids, self._config
        found: dict[int, int] = {}
        for size in range(min(config.max_ngram, len(ids) - 1), config.min_ngram - 1, -1):
            ends = self._ends.get(tuple(ids[len(ids) - size :]), {})
            for token, end in reversed(ends.items()):
                if len(found) < config.num_continuations:
                    found.setdefault(token, end)
        if config.earliest:
            return [ids[end : end + num_tokens] for end in found.values()]
        return [
            [ids[end + offset % (len(ids) - end)] for offset in range(num_tokens // rank)]
            for rank, end in enumerate(found.values(), start=1)
        ]
