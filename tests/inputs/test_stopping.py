"""Rows stop at the same token as in `model.generate`, and streamers get nothing past it."""

import string
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast
from transformers.generation import stopping_criteria as hf

import draftsmith
from draftsmith import Target
from tests.support.drafters import Scripted
from tests.support.models import padded, prompts, tiny_model, tiny_target

NUM_NEW = 16


def syllables() -> PreTrainedTokenizerFast:
    """Returns a tokenizer of letters and pairs of letters, which are joined without blanks."""
    pairs = [first + second for first in "bcdfgklmn" for second in "aeio"] + ["st", "ch"]
    words = {word: number for number, word in enumerate([*string.ascii_lowercase, *pairs])}
    tokenizer = Tokenizer(BPE(words, merges=[]))
    tokenizer.decoder = ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def target_with_words() -> Target:
    return Target(tiny_target("llama").model, syllables())


def stop_strings_of(target: Target, rows: list[list[int]]) -> list[str]:
    """Returns a text over three of the first row's new tokens, and one of the third row's."""
    new = [draftsmith.generate(target, [row], max_new_tokens=NUM_NEW).sequences[0, len(row) :].tolist() for row in rows]
    first = target.tokenizer.convert_ids_to_tokens(new[0])
    return ["".join(first[4:7]), target.tokenizer.convert_ids_to_tokens(new[2])[9]]


@pytest.mark.parametrize("trees", [False, True])
def test_stop_strings_stop_each_row_where_transformers_does(trees: bool) -> None:
    target, rows = target_with_words(), prompts(3)
    strings = stop_strings_of(target, rows)
    ids, mask = padded(rows, side="left")
    # Without an end-of-sequence transformers lets stopped rows go on until all have stopped.
    given = {"attention_mask": mask, "max_new_tokens": NUM_NEW, "pad_token_id": 0, "eos_token_id": 2}
    own = target.model.generate(ids, stop_strings=strings, tokenizer=target.tokenizer, **given)
    texts = [row[ids.shape[1] - len(p) :] + [3] * NUM_NEW for row, p in zip(own.tolist(), rows, strict=True)]
    drafter = Scripted(target, texts, trees=trees, wrong_every=7)
    found = target.model.generate(
        ids, stop_strings=strings, custom_generate=draftsmith.custom_generate, drafter=drafter, **given
    )
    assert found.tolist() == own.tolist()
    out = draftsmith.generate(target, ids, drafter, attention_mask=mask, max_new_tokens=NUM_NEW, stop_strings=strings)
    num_new = [int(end) - len(row) for end, row in zip(out.lengths, rows, strict=True)]
    assert num_new[0] == 7 and num_new[2] <= 10 and len(set(num_new)) > 1
    assert out.sequences[0, len(rows[0]) : out.lengths[0]].tolist() == own[0, ids.shape[1] :][: num_new[0]].tolist()


def test_stop_strings_may_begin_in_the_prompt_as_in_transformers() -> None:
    target, (prompt,) = target_with_words(), prompts(1)
    new = draftsmith.generate(target, [prompt], max_new_tokens=2).sequences[0].tolist()
    across = "".join(target.tokenizer.convert_ids_to_tokens(new[len(prompt) - 1 : len(prompt) + 1]))
    out = draftsmith.generate(target, [prompt], max_new_tokens=NUM_NEW, stop_strings=across)
    own = target.model.generate(
        torch.tensor([prompt]), max_new_tokens=NUM_NEW, stop_strings=across, tokenizer=target.tokenizer
    )
    assert out.sequences.tolist() == own.tolist() and own.shape[1] == len(prompt) + 1


def test_streamers_get_nothing_past_a_stop() -> None:
    target, rows = target_with_words(), prompts(1)
    streamed: list[int] = []
    streamer = type("Pieces", (), {"put": lambda _, piece: streamed.extend(piece.tolist()), "end": lambda _: None})()
    plain = draftsmith.generate(target, rows, max_new_tokens=NUM_NEW).sequences[0].tolist()
    word = target.tokenizer.convert_ids_to_tokens(plain)[len(rows[0]) + 2]
    drafter = Scripted(target, [plain], trees=False)
    out = draftsmith.generate(
        target, rows, drafter, max_new_tokens=NUM_NEW, stop_strings=[word], streamer=streamer, length="fixed"
    )
    assert streamed == out.sequences[0].tolist() == plain[: len(streamed)] and len(streamed) <= len(rows[0]) + 3
    assert out.stats.new_tokens == len(streamed) - len(rows[0])


class SumsToThree(hf.StoppingCriteria):
    """A user's own: stops once at least four tokens are new and the ids sum to a multiple of three."""

    def __init__(self, num_prompt: int) -> None:
        self.num_prompt, self.lengths = num_prompt, []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.lengths.append(input_ids.shape[1])
        return (input_ids.sum(1) % 3 == 0) & (input_ids.shape[1] >= self.num_prompt + 4)


def test_users_own_criteria_see_each_committed_token_in_order() -> None:
    target, (prompt,) = tiny_target("llama"), prompts(1)
    theirs, ours = SumsToThree(len(prompt)), SumsToThree(len(prompt))
    own = target.model.generate(torch.tensor([prompt]), max_new_tokens=NUM_NEW, stopping_criteria=[theirs])
    drafter = Scripted(target, [own[0].tolist() + [3] * NUM_NEW], trees=True)
    for given in (ours, hf.StoppingCriteriaList([ours])):
        out = draftsmith.generate(target, [prompt], drafter, max_new_tokens=NUM_NEW, stopping_criteria=given)
        assert out.sequences.tolist() == own.tolist() and own.shape[1] < len(prompt) + NUM_NEW
        assert ours.lengths == theirs.lengths
        ours.lengths.clear()


def test_lengths_and_ends_of_users_criteria_are_respected() -> None:
    target, rows = tiny_target("llama"), prompts(1)
    plain = target.model.generate(torch.tensor(rows), max_new_tokens=NUM_NEW)
    end = int(plain[0, len(rows[0]) + 4])
    for criterion in (hf.MaxLengthCriteria(len(rows[0]) + 3), hf.EosTokenCriteria(end)):
        given: Any = {"max_new_tokens": NUM_NEW, "stopping_criteria": [criterion]}
        own = target.model.generate(torch.tensor(rows), **given)
        found = target.model.generate(torch.tensor(rows), custom_generate=draftsmith.custom_generate, **given)
        assert found.tolist() == own.tolist() and own.shape[1] < plain.shape[1]


def test_max_time_stops_between_steps() -> None:
    target, rows = tiny_target("llama"), prompts(3)
    settings = {"max_time": 1e-6}
    out = draftsmith.generate(target, rows, max_new_tokens=NUM_NEW, generation_config=settings)
    assert (out.lengths - torch.tensor(list(map(len, rows)))).tolist() == [1] * 3
    out = draftsmith.generate(target, rows, max_new_tokens=NUM_NEW, generation_config={"max_time": 3600.0})
    assert out.stats.new_tokens == 3 * NUM_NEW


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"stop_strings": ""}, "stop_strings is ''; it must be a text or a list of texts, none empty"),
        ({"stop_strings": []}, r"stop_strings is \[\]; it must be a text"),
        ({"stop_strings": [3]}, r"stop_strings is \[3\]; it must be a text"),
        ({"stop_strings": "€"}, "stop_strings is '€': .* unable to identify tokens"),
        ({"stopping_criteria": [4]}, "stopping criterion int cannot be called"),
        ({"stopping_criteria": SumsToThree(3)}, "SumsToThree is not supported for 3 rows.*generate row by row"),
        ({"stopping_criteria": hf.ConfidenceCriteria(0.3)}, "ConfidenceCriteria is not supported: it is for assistant"),
        ({"generation_config": {"max_time": "soon"}}, "max_time is 'soon'; it must be a finite number"),
    ],
)
def test_criteria_that_cannot_be_used_are_rejected(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        draftsmith.generate(target_with_words(), prompts(3), max_new_tokens=4, **given)
    assert "\n" not in str(error.value)


def test_stop_strings_need_a_tokenizer() -> None:
    target = Target(tiny_model("llama"))
    with pytest.raises(ValueError, match="stop_strings is 'ab', but the target has no tokenizer; make it as Target"):
        draftsmith.generate(target, prompts(1), max_new_tokens=4, stop_strings="ab")
    given: Any = {"custom_generate": draftsmith.custom_generate, "stop_strings": "ab", "max_new_tokens": 4}
    out = target.model.generate(torch.tensor(prompts(1)), stop_tokenizer=syllables(), **given)
    own = target.model.generate(torch.tensor(prompts(1)), max_new_tokens=4, stop_strings="ab", tokenizer=syllables())
    assert out.tolist() == own.tolist()
