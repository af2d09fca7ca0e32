"""Prompt lookup: what is copied, against a search without an index."""

import random
from pathlib import Path

import pytest
import torch

import draftsmith
from draftsmith.drafters import Session, lookup
from draftsmith.drafters.lookup import Config, Drafter, _Index
from draftsmith.tree import Draft
from tests.family import Watched, check_family, texts
from tests.models import SEQ2SEQ, greedy_by_transformers, padded, prompts, tiny_target

EXAMPLE = Config()


def test_family(tmp_path: Path) -> None:
    check_family(lookup, Config(), tmp_path)


def slow_continuation(config: Config, text: list[int], num_tokens: int) -> list[int]:
    """Returns what follows the latest occurrence of the longest n-gram that ends the text; copies may be copied on."""
    for size in range(config.max_ngram, config.min_ngram - 1, -1):
        for begin in range(len(text) - size - 1, -1, -1):
            if text[begin : begin + size] == text[len(text) - size :]:
                longer = list(text)
                for at in range(num_tokens):
                    longer.append(longer[begin + size + at])
                return longer[len(text) :]
    return []


@pytest.mark.parametrize("seed", range(30))
def test_the_index_finds_what_a_search_finds(seed: int) -> None:
    rng = random.Random(seed)
    low = rng.randint(1, 3)
    config = Config(max_ngram=low + rng.randint(0, 3), min_ngram=low, num_draft=7)
    source = [rng.randrange(3) for _ in range(rng.choice([0, 0, 8]))]
    index, row = _Index(config, source), [rng.randrange(3)]
    for _ in range(12):
        index.extend(row)
        num_tokens = rng.randint(1, 7)
        assert index.continuation(num_tokens) == slow_continuation(config, source + row, num_tokens), (source, row)
        row += [rng.randrange(3) for _ in range(rng.randint(0, 4))]


def test_a_case_by_hand() -> None:
    def found(text: list[int], **settings: int) -> list[int]:
        index = _Index(Config(**settings), [])
        index.extend(text)
        return index.continuation(4)

    assert found([1, 2, 3, 4, 1, 2]) == [3, 4, 1, 2]
    assert found([1, 2, 7, 5, 2, 8, 1, 2]) == [7, 5, 2, 8], "a longer match wins over a later one"
    assert found([1, 2, 7, 1, 2, 8, 1, 2]) == [8, 1, 2, 8], "of equal matches the latest; at the end it goes round"
    assert found([5, 6, 6]) == [6, 6, 6, 6]
    assert found([1, 2, 3]) == []
    assert found([1, 2, 3, 9, 3], min_ngram=2) == []


class Copied(Watched):
    """Notes what each row copied, padding left off, and compares it with the slow search."""

    def start(self, session: Session) -> None:
        super().start(session)
        self.copied: list[list[list[int]]] = []
        source = session.source
        masks = source.mask_BT.bool() if source is not None else ()
        self._sources = [source.tokens_BT[row, mask].tolist() for row, mask in enumerate(masks)] if source else []

    def propose(self, budget: int) -> Draft:
        draft = super().propose(budget)
        assert draft.num_nodes is not None and draft.tree.is_chain
        copied = [ids[1:used] for ids, used in zip(draft.tokens_BN.tolist(), draft.num_nodes, strict=True)]
        sources = self._sources or [[] for _ in copied]
        for source, row, found in zip(sources, self._session.rows, copied, strict=True):
            assert found == slow_continuation(self.config, source + row, min(budget, self.config.num_draft))
        self.copied.append(copied)
        return draft


def test_rows_of_a_batch_copy_each_their_own() -> None:
    target = tiny_target("llama")
    rows = [[1, 2, 3, 4, 1, 2], [5, 6, 7], [8, 8]]
    ids, mask = padded(rows, side="left")
    drafter = Copied(Drafter(Config(num_draft=3), target))
    draftsmith.generate(target, ids, drafter, attention_mask=mask, max_new_tokens=6)
    assert drafter.copied[0] == [[3, 4, 1], [], [8, 8, 8]]
    draftsmith.generate(target, ids, drafter, attention_mask=mask, max_new_tokens=3)
    assert drafter.copied[0] == [[3, 4], [], [8, 8]], "no deeper than the tokens still to come"


@pytest.mark.parametrize("architecture", SEQ2SEQ)
def test_an_encoders_source_is_searched_too(architecture: str) -> None:
    """What follows in the source is copied, and where it ends what the decoder has said."""
    index = _Index(Config(), [20, 21, 22, 23, 24])
    index.extend([0, 21, 22])
    assert index.continuation(4) == [23, 24, 0, 21]
    target = tiny_target(architecture)
    text = greedy_by_transformers(architecture, 1, 20)[0]
    ids, mask = padded([prompts(1)[0], text[1:12]], side="left")
    drafter = Copied(Drafter(Config(num_draft=4), target))
    draftsmith.generate(target, ids, drafter, attention_mask=mask, max_new_tokens=20)
    assert any(copied for step in drafter.copied for copied in step)


def test_text_that_repeats_itself_is_drafted_well() -> None:
    """A model that has fallen into a cycle: all that is copied is accepted."""
    target = tiny_target("gemma3_text")
    text = greedy_by_transformers("gemma3_text", 1, 20)[0]
    assert text[10:18] == [text[9]] * 8, "the tiny model has changed: choose another one that repeats itself"
    out = draftsmith.generate(target, torch.tensor([text[:12]]), Drafter(Config(num_draft=3), target), max_new_tokens=5)
    assert texts(out) == [text[:17]]
    assert out.stats.steps == 2


def test_settings_that_cannot_be_are_refused() -> None:
    for settings in ({"max_ngram": 1, "min_ngram": 2}, {"min_ngram": 0}, {"max_ngram": 0}):
        with pytest.raises(ValueError, match="must be at least 1 and at most max_ngram"):
            Config(**settings)
    with pytest.raises(ValueError, match="num_draft is 0; it must be at least 1"):
        Config(num_draft=0)
