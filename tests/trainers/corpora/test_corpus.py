"""Documents of rows and their selection within a budget against slow references, resumable chunks, and evaluation."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from safetensors.numpy import load_file

import draftsmith
from data.batches import Example, collate, example
from draftsmith.drafters import lookup
from tests.support.models import SEQ2SEQ, greedy_by_transformers, prompts, tiny_target
from trainers.corpora import corpus
from trainers.corpora.corpus import build_chunks, documents, select_documents
from trainers.corpora.evaluation import evaluate

ROWS = some.lists(some.lists(some.tuples(some.integers(0, 2), some.booleans()), min_size=1, max_size=9), max_size=6)
FEW = settings(max_examples=60, deadline=None)


def rows_of(texts: Sequence[Sequence[int]]) -> list[Example]:
    return [example(list(text), None, str(number)) for number, text in enumerate(texts)]


def lists(texts: Sequence[np.ndarray]) -> list[list[int]]:
    return [text.tolist() for text in texts]


def slow_documents(rows: list[list[tuple[int, bool]]], context: int) -> list[list[int]]:
    """Returns the documents of rows, read token by token."""
    found: list[list[int]] = []
    for row in rows:
        before: list[int] = []
        text: list[int] | None = None
        for token, is_learnt in [*row, (0, False)]:
            if is_learnt:
                text = [*(before[-context:] if context else []), token] if text is None else [*text, token]
                before = []
            else:
                if text is not None and text not in found:
                    found.append(text)
                text = None
                before.append(token)
    return found


@FEW
@given(ROWS, some.integers(0, 3))
def test_documents_are_the_supervised_runs(rows: list[list[tuple[int, bool]]], context: int) -> None:
    examples = [example([token for token, _ in row], [one for _, one in row], "row") for row in rows]
    found = list(documents(examples, context))
    assert lists(found) == slow_documents(rows, context)
    assert all(text.dtype == np.int64 for text in found)


def test_documents_of_an_encoder_decoder_begin_with_the_start_token_and_are_unique_per_source() -> None:
    written = [([0, 5, 6], [7, 8]), ([0, 5, 6], [9]), ([0, 5, 6], [9]), ([0, 4], [5])]
    rows = [example(ids, [False, *[True] * (len(ids) - 1)], "row", source) for ids, source in written]
    for context in (0, 1, 3):
        assert lists([*documents(rows, context)]) == [[0, 5, 6], [0, 5, 6], [0, 4]]
    assert lists(select_documents(rows, 100)) == [[0, 5, 6], [0, 4]], "a text is stored once"


def ngrams(text: Sequence[int]) -> set[tuple[int, ...]]:
    return {tuple(text[at : at + corpus.NGRAM]) for at in range(len(text) - corpus.NGRAM + 1)}


def slow_value(
    text: tuple[int, ...], times: Counter, reference: list[tuple[int, ...]], kept: list[tuple[int, ...]]
) -> float:
    value = 0.0
    for ngram in ngrams(text):
        num_others = sum(ngram in ngrams(one) for one in reference if one != text)
        value += num_others / (sum(ngram in ngrams(one) for one in kept) + 1) ** 2
    return times[text] * value / len(text)


@FEW
@given(
    some.lists(some.lists(some.integers(0, 1), min_size=1, max_size=12).map(tuple), min_size=1, max_size=12),
    some.integers(1, 60),
)
def test_select_takes_the_most_valuable_document_that_fits(texts: list[tuple[int, ...]], budget: int) -> None:
    times = Counter(texts)
    names = {text: corpus._digest(np.array(text)) for text in times}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "REFERENCE_EVERY", 3)
        chosen, coverage = corpus._select(
            {names[text]: np.array(text) for text in times}, Counter({names[one]: times[one] for one in times}), budget
        )
    text_of = {name: text for text, name in names.items()}
    reference = [text_of[name] for name in sorted(text_of)[: max(1, len(times) // 3)]]
    kept: list[tuple[int, ...]] = []
    left = set(times)
    for text in (text_of[name] for name in chosen):
        assert len(text) + 1 <= budget
        fitting = [one for one in left if len(one) + 1 <= budget]
        values = {one: slow_value(one, times, reference, kept) for one in fitting}
        assert values[text] >= max(values.values()) - 1e-9
        if values[text] == 0:
            assert times[text] == max(times[one] for one in fitting)
        kept.append(text)
        left.remove(text)
        budget -= len(text) + 1
    assert all(len(one) + 1 > budget for one in left)
    recurring = [one for text in reference for one in ngrams(text) if sum(one in ngrams(other) for other in times) > 1]
    covered = [one for one in recurring if any(one in ngrams(text) for text in kept)]
    assert coverage == pytest.approx(len(covered) / len(recurring) if recurring else 1)


def test_select_documents_prefers_frequent_and_recurring_text(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(corpus, "_digest", lambda text: bytes(text.tolist()))
    reference, alike, twice, odd = [1, 2, 3, 4, 5], [6, 2, 3, 4, 5], [7, 8, 9, 10, 11], [12, 13, 14, 15, 16]
    rows = rows_of([odd, twice, alike, twice, reference])
    assert lists(select_documents(rows, 12)) == [twice, alike], "the repeated text and the one like the reference"
    printed = capsys.readouterr().out
    assert "keeps 2 of 4 documents, 12 of 24 tokens; they contain 100% of the recurring n-grams" in printed
    assert lists(select_documents(rows, 24)) == [odd, twice, alike, reference]
    assert capsys.readouterr().out == "", "nothing was dropped"
    assert select_documents([], 5) == []
    with pytest.raises(ValueError, match="no document fits into the budget of 5 tokens"):
        select_documents(rows, 5)


def sums(rows: Sequence[int]) -> dict[str, np.ndarray]:
    return {"sum": np.array([sum(rows)]), "rows": np.array(list(rows), np.int32)}


def test_build_chunks_continues_an_interrupted_build(tmp_path: Path) -> None:
    made = []

    def interrupted_sums(rows: Sequence[int]) -> dict[str, np.ndarray]:
        made.append(list(rows))
        if len(made) == 3:
            raise KeyboardInterrupt
        return sums(rows)

    with pytest.raises(KeyboardInterrupt):
        build_chunks(range(7), tmp_path / "run", 3, interrupted_sums)
    (tmp_path / "run" / "parts" / ".0002.safetensors.part-77").write_bytes(b"cut sh")
    files = build_chunks(range(7), tmp_path / "run", 3, interrupted_sums)
    assert made == [[0, 1, 2], [3, 4, 5], [6], [6]]
    assert [load_file(file)["sum"].tolist() for file in files] == [[3], [12], [6]]
    whole = build_chunks(range(7), tmp_path / "whole", 3, sums)
    assert [file.name for file in files] == ["0000.safetensors", "0001.safetensors", "0002.safetensors"]
    assert [file.read_bytes() for file in files] == [file.read_bytes() for file in whole]
    assert {file.name for file in files[0].parent.iterdir()} == {*(file.name for file in files), corpus.MARKER}
    with pytest.raises(ValueError, match="num_rows was 7, is 8"):
        build_chunks(range(8), tmp_path / "run", 3, sums)
    assert build_chunks([], tmp_path / "none", 3, sums) == []


def test_evaluate_counts_tokens_as_decoding_row_by_row_does() -> None:
    """Rows of unequal length, each continued from its half, accept as many tokens as when decoded one by one."""
    target = tiny_target("gemma3_text")  # it repeats itself
    drafter = lookup.Drafter(lookup.Config(), target)
    rows = [text[:end] for text, end in zip(greedy_by_transformers("gemma3_text", 3, 20), (24, 9, 1), strict=True)]
    examples = [example(row * 2, None, str(number)) for number, row in enumerate(rows)]
    metrics = evaluate(drafter, collate(examples), None, target, new_tokens=8)
    num_accepted = num_rounds = 0
    for row in rows:
        stats = draftsmith.generate(target, torch.tensor([row]), drafter, max_new_tokens=8).stats
        num_accepted, num_rounds = num_accepted + sum(stats.accepted), num_rounds + stats.steps
    assert (int(metrics["acceptance"][0]), metrics["acceptance"][1]) == (num_accepted, num_rounds)
    assert num_accepted > 0


@pytest.mark.parametrize("architecture", SEQ2SEQ)
def test_evaluate_decodes_an_encoder_decoder_from_the_start(architecture: str) -> None:
    """Each row's source is read without padding, and as many tokens are accepted as when each is decoded alone."""
    target = tiny_target(architecture)
    drafter = lookup.Drafter(lookup.Config(), target)
    sources = prompts(5)
    batch = collate([example([0, 5], [False, True], str(at), source) for at, source in enumerate(sources)])
    metrics = evaluate(drafter, batch, None, target, new_tokens=12)
    num_accepted = num_rounds = 0
    for source in sources:
        stats = draftsmith.generate(target, torch.tensor([source]), drafter, max_new_tokens=12).stats
        num_accepted, num_rounds = num_accepted + sum(stats.accepted), num_rounds + stats.steps
    assert (int(metrics["acceptance"][0]), metrics["acceptance"][1]) == (num_accepted, num_rounds)
    assert num_accepted > 0 and num_rounds + num_accepted == 12 * 5
