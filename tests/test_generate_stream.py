"""`generate_stream`: rows that come and go, against each prompt decoded alone."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import draftsmith
from draftsmith import Target
from draftsmith.core.drafter import Session
from draftsmith.core.rows import Text, replace_ended
from draftsmith.core.stats import GenerationStats
from draftsmith.drafters import lookup
from tests.support.drafters import tiny_drafter
from tests.support.models import VOCAB_SIZE, prompts, tiny_model, tiny_target

NUM_NEW, NUM_PROMPTS = 16, 11
EOS = tuple(range(3, VOCAB_SIZE, 9))


def greedy(target: Target, number: int = NUM_PROMPTS) -> list[list[int]]:
    """Returns transformers' greedy new tokens of each prompt alone, up to the first of `EOS`."""
    found = []
    for prompt in prompts(number, seed=4):
        ids = torch.tensor([prompt])
        given = {"do_sample": False, "max_new_tokens": NUM_NEW, "eos_token_id": list(EOS)}
        out = target.model.generate(ids, attention_mask=torch.ones_like(ids), **given)[0].tolist()
        found.append(out[1 if target.is_encoder_decoder else len(prompt) :])
    return found


def stream(target: Target, drafter: Any = None, **settings: Any) -> list[draftsmith.StreamedText]:
    settings = {"batch_size": 3, "max_new_tokens": NUM_NEW, "eos_token_id": EOS} | settings
    texts = list(draftsmith.generate_stream(target, prompts(NUM_PROMPTS, seed=4), drafter, **settings))
    assert sorted(text.index for text in texts) == list(range(NUM_PROMPTS))
    return sorted(texts, key=lambda text: text.index)


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gpt2", "t5", "bart"])
@pytest.mark.parametrize("drafter", ["none", "lookup"])
def test_greedy_streams_equal_each_prompt_alone(architecture: str, drafter: str) -> None:
    target, stats = tiny_target(architecture), GenerationStats(num_rows=0)
    expected = greedy(target)
    drafting = lookup.Drafter(lookup.Config(), target) if drafter == "lookup" else None
    texts = stream(target, drafting, stats=stats)
    assert [text.new_ids for text in texts] == expected
    start = [target.decoder_start_token_id]
    starts = [start if target.is_encoder_decoder else prompt for prompt in prompts(NUM_PROMPTS, seed=4)]
    assert [text.prompt_ids for text in texts] == starts
    assert [text.ended for text in texts] == [new[-1] in EOS for new in expected]
    assert len({len(new) for new in expected}) > 2, "rows must end at different times"
    assert (stats.num_rows, stats.new_tokens) == (NUM_PROMPTS, sum(map(len, expected)))
    if drafter == "none":
        assert stats.steps == stats.new_tokens
        assert stats.rounds < sum(max(map(len, expected[at : at + 3])) for at in range(0, NUM_PROMPTS, 3)), "kept full"


@pytest.mark.parametrize("drafter", ["copy", "medusa", "eagle3"])
def test_drafters_with_state_start_again_as_rows_change(drafter: str) -> None:
    """A draft model with a cache, heads that read the last hidden states, and one that reads several layers."""
    target = tiny_target("llama")
    assert [text.new_ids for text in stream(target, tiny_drafter(drafter, "llama"))] == greedy(target)


class Following(lookup.Drafter):
    """A drafter that follows rows, counting how often it was started."""

    num_starts = 0

    def start(self, session: Session) -> None:
        self.num_starts += 1
        self._live = session
        super().start(session)

    def change_rows(self, origins: list[int | None]) -> bool:
        assert len(origins) == len(self._live.rows) == len(self._live.cache.lengths)
        super().start(self._live)
        return True


def test_a_drafter_that_follows_rows_is_started_once() -> None:
    target = tiny_target("llama")
    drafter = Following(lookup.Config(), target)
    assert [text.new_ids for text in stream(target, drafter)] == greedy(target)
    assert drafter.num_starts == 1


@pytest.mark.parametrize("drafter", [None, "copy"])
def test_sampled_texts_do_not_depend_on_those_beside_them(drafter: str | None) -> None:
    target = tiny_target("llama")
    drafting = tiny_drafter(drafter, "llama") if drafter else None
    settings = {"temperature": 1.0, "top_p": 0.95, "seed": 7, "length": "fixed=3"}
    alone, together = (
        [text.new_ids for text in stream(target, drafting, batch_size=size, **settings)] for size in (1, 4)
    )
    assert alone == together
    assert stream(target, drafting, **settings | {"seed": 8})[0].new_ids != alone[0] or len(alone[0]) == 1


def test_seeds_of_prompts_may_be_given() -> None:
    target = tiny_target("llama")
    prompt = prompts(1)[0]
    settings = {"max_new_tokens": 8, "temperature": 1.0, "eos_token_id": (), "batch_size": 2}
    texts = list(draftsmith.generate_stream(target, [prompt] * 4, seed=[5, 6, 5, 7], **settings))
    found = {text.index: tuple(text.new_ids) for text in texts}
    assert found[0] == found[2] and len(set(found.values())) == 3


def test_prompts_of_an_iterator_are_taken_as_places_become_free() -> None:
    taken: list[int] = []

    def source() -> Iterator[list[int]]:
        for index, prompt in enumerate(prompts(6)):
            taken.append(index)
            yield prompt

    texts = draftsmith.generate_stream(tiny_target("llama"), source(), batch_size=2, max_new_tokens=4)
    assert taken == []
    first = next(texts)
    assert taken == [0, 1] and first.index == 0
    assert len([first, *texts]) == 6 == len(taken)


def test_plain_decoding_of_one_batch_drops_rows_that_ended() -> None:
    """The forwards of a batch shrink as rows end, and every row has the text that it has alone."""
    target, expected = Target(tiny_model("llama")), greedy(tiny_target("llama"))
    sizes: list[int] = []
    forward = target.forward
    target.forward = lambda tokens_BN, *args, **kwargs: (
        sizes.append(len(tokens_BN)) or forward(tokens_BN, *args, **kwargs)
    )
    out = draftsmith.generate(target, prompts(NUM_PROMPTS, seed=4), max_new_tokens=NUM_NEW, eos_token_id=EOS)
    rows = zip(out.sequences.tolist(), out.lengths.tolist(), prompts(NUM_PROMPTS, seed=4), strict=True)
    assert [row[len(prompt) : length] for row, length, prompt in rows] == expected
    running = [sum(len(new) > step for new in expected) for step in range(max(map(len, expected)))]
    assert sizes[1:] == running, "after the prefill"


def test_replace_ended_fills_places_and_closes_gaps() -> None:
    def texts(*names: int, ended: tuple[int, ...] = ()) -> list[Text]:
        return [Text(index=name, ids=[], limit=1, is_running=name not in ended) for name in names]

    for ended, new, expected, origins in (
        ((1,), (9,), [0, 9, 2, 3], [0, None, 2, 3]),
        ((0, 3), (9,), [9, 1, 2], [None, 1, 2]),
        ((0, 2), (), [3, 1], [3, 1]),
        ((1, 2, 3), (8,), [0, 8], [0, None]),
        ((0, 1, 2, 3), (), [], []),
    ):
        rows = texts(0, 1, 2, 3, ended=ended)
        assert replace_ended(rows, texts(*new)) == origins
        assert [text.index for text in rows] == expected


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0; it must be at least 1"),
        ({"prompts": [[3], []]}, "prompt 1 is empty"),
        ({"prompts": [[3], [4, 5], [VOCAB_SIZE]]}, f"prompt 2 holds token {VOCAB_SIZE}"),
        ({"prompts": [[3], [4] * 60]}, "prompt 1 has 60 tokens, and with max_new_tokens=16"),
        ({"seed": [1, 2, 3]}, "seed has 3 numbers for 2 prompts"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
    ],
)
def test_mistakes_are_named_before_anything_runs(changed: dict[str, Any], message: str) -> None:
    given = {"prompts": [[3], [4, 5]], "max_new_tokens": NUM_NEW} | changed
    with pytest.raises(ValueError, match=message):
        draftsmith.generate_stream(tiny_target("llama"), given.pop("prompts"), **given)


def test_no_prompts_give_no_texts() -> None:
    assert list(draftsmith.generate_stream(tiny_target("llama"), [])) == []
