"""`generate_stream`: rows that come and go, against each prompt decoded alone."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.generation.logits_process import (
    NoRepeatNGramLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
)

import draftsmith
from draftsmith import Target
from draftsmith.core.drafter import Session
from draftsmith.core.stats import GenerationStats
from draftsmith.drafters import lookup
from draftsmith.inputs.texts import Text, replace_ended
from tests.inputs.test_stopping import syllables
from tests.support.distributions import (
    FALSE_ALARM,
    NUM_TOKENS,
    PROMPT,
    cells,
    distribution_target,
    exact_distribution,
    p_value,
)
from tests.support.drafters import sampled_drafter, tiny_drafter
from tests.support.models import VOCAB_SIZE, padded, prompts, tiny_model, tiny_target

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
def test_drafters_with_state_follow_rows(drafter: str) -> None:
    """A draft model with a cache, heads that read the last hidden states, and one that reads several layers."""
    target = tiny_target("llama")
    assert [text.new_ids for text in stream(target, tiny_drafter(drafter, "llama"))] == greedy(target)


ROWS = [*prompts(6, seed=4), [7]]
"""Prompts of different lengths; transformers counts a single token differently."""
PENALTIES: dict[str, Any] = {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "min_new_tokens": 5}
FORCED: dict[str, Any] = {
    "begin_suppress_tokens": list(range(20)),
    "exponential_decay_length_penalty": (3, 1.9),
    "forced_bos_token_id": 12,
    "forced_eos_token_id": 9,
    "sequence_bias": {(5,): 3.0, (28, 8): 6.0, (9, 9, 9): -4.0},
}
OF_PROMPTS: dict[str, Any] = {"encoder_repetition_penalty": 2.0, "encoder_no_repeat_ngram_size": 1}


@pytest.mark.parametrize(
    ("architecture", "drafter", "given"),
    [
        ("llama", "copy", PENALTIES),
        ("llama", "lookup", FORCED),
        ("llama", "none", OF_PROMPTS | {"min_length": 12}),
        ("t5", "lookup", OF_PROMPTS | PENALTIES),
    ],
    ids=["penalties", "forced", "prompts", "t5"],
)
def test_each_text_has_the_logits_processors_of_its_own_prompt(
    architecture: str, drafter: str, given: dict[str, Any]
) -> None:
    """As `model.generate` has them for this prompt alone."""
    target = tiny_target(architecture)
    expected = []
    for prompt in ROWS:
        options = {"max_new_tokens": NUM_NEW, "pad_token_id": 0, "eos_token_id": list(EOS), **given}
        out = target.model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), **options)
        expected.append(out[0, 1 if target.is_encoder_decoder else len(prompt) :].tolist())
    drafting = tiny_drafter(drafter, architecture) if drafter != "none" else None
    config = {"eos_token_id": list(EOS), **given}
    options = {"batch_size": 3, "max_new_tokens": NUM_NEW, "generation_config": config}
    texts = sorted(draftsmith.generate_stream(target, iter(ROWS), drafting, **options), key=lambda text: text.index)
    assert [text.new_ids for text in texts] == expected
    assert len({len(new) for new in expected}) > 2, "rows must end at different times"
    plain = [text.new_ids for text in draftsmith.generate_stream(target, ROWS, max_new_tokens=NUM_NEW)]
    assert sum(own[: len(other)] != other for own, other in zip(expected, plain, strict=True)) > 3


def test_prefix_constraints_are_told_the_number_of_the_prompt() -> None:
    def allowed(number: int, prefix: torch.Tensor) -> list[int]:
        return [4 * number + (int(prefix[-1]) + 1) % 4]

    processor = PrefixConstrainedLogitsProcessor(allowed, 1)
    target, drafter = tiny_target("llama"), tiny_drafter("copy", "llama")
    settings = {"max_new_tokens": 5, "eos_token_id": (), "batch_size": 2, "logits_processor": processor}
    for text in draftsmith.generate_stream(target, prompts(5), drafter, **settings):
        last, expected = text.prompt_ids[-1], []
        for _ in range(5):
            last = 4 * text.index + (last + 1) % 4
            expected.append(last)
        assert text.new_ids == expected


@pytest.mark.parametrize("verifier", ["auto", "coupled"])
def test_sampled_texts_under_processors_do_not_depend_on_those_beside_them(verifier: str) -> None:
    target, drafter = tiny_target("llama"), tiny_drafter("copy", "llama")
    config = PENALTIES | {"min_p": 0.05, "temperature": 0.9, "eos_token_id": list(EOS)}
    settings = {"generation_config": config, "eos_token_id": None, "seed": 7, "verifier": verifier, "length": "fixed=3"}
    alone, together = ([t.new_ids for t in stream(target, drafter, batch_size=size, **settings)] for size in (1, 4))
    assert alone == together
    plain = [text.new_ids for text in stream(target, None, **settings)]
    assert (plain == alone) == (verifier == "coupled")


def test_sampled_streams_under_processors_follow_the_target_distribution() -> None:
    """2,500 texts, of which 250 are written at a time; drafts of unequal lengths, so that rows change at every step."""
    target, drafter = distribution_target(), sampled_drafter("lm")
    processors = [RepetitionPenaltyLogitsProcessor(1.7), NoRepeatNGramLogitsProcessor(3)]
    probs_C = exact_distribution(target, temperature=1.2, logits_processor=processors)
    texts = draftsmith.generate_stream(
        target,
        [PROMPT] * 2_500,
        drafter,
        batch_size=250,
        max_new_tokens=NUM_TOKENS + 2,
        temperature=1.2,
        seed=0,
        eos_token_id=(),
        logits_processor=processors,
    )
    new_BT = torch.tensor([text.new_ids[:NUM_TOKENS] for text in texts])
    assert p_value(torch.bincount(cells(new_BT), minlength=len(probs_C)), probs_C) > FALSE_ALARM


def test_stop_strings_end_texts() -> None:
    target = Target(tiny_target("llama").model, syllables())
    plain = stream(target, eos_token_id=())
    words = target.tokenizer.convert_ids_to_tokens(plain[0].new_ids)
    found = stream(target, lookup.Drafter(lookup.Config(), target), eos_token_id=(), stop_strings=["".join(words[4:7])])
    assert len(found[0].new_ids) == 7 and not found[0].ended
    assert all(own.new_ids[: len(new.new_ids)] == new.new_ids for own, new in zip(plain, found, strict=True))


def test_max_time_ends_the_texts_being_written_and_begins_no_others() -> None:
    options = {"batch_size": 2, "max_new_tokens": NUM_NEW, "generation_config": {"max_time": 1e-6}}
    texts = list(draftsmith.generate_stream(tiny_target("llama"), prompts(6), **options))
    assert [(text.index, len(text.new_ids)) for text in texts] == [(0, 1), (1, 1)]


class Following(lookup.Drafter):
    """A drafter that follows rows, counting how often it was started."""

    num_starts = 0

    def start(self, session: Session) -> None:
        self.num_starts += 1
        self._live = session
        super().start(session)

    def change_rows(self, origins: list[int | None], new: Session | None) -> bool:
        assert len(origins) == len(self._live.rows) == len(self._live.cache.lengths)
        assert origins.count(None) == (len(new.rows) if new is not None else 0)
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
        ({"prompts": "text"}, "prompts is 'text'; it must be a list or iterator of prompts"),
        ({"prompts": 5}, "prompts is 5; it must be a list or iterator of prompts"),
        ({"prompts": [3, 4, 5]}, "prompt 0 is 3; each prompt must be a list of token ids"),
        ({"prompts": [[3], "text"]}, "prompt 1 is 'text'; each prompt must be a list of token ids"),
        ({"prompts": [torch.tensor([3]), {"input_ids": [[3], [4]]}]}, "prompt 1 holds 2 rows; pass each as a prompt"),
        ({"length": "node_gain=3"}, "length is 'node_gain=3'; node_gain takes no number"),
        ({"length": "gain"}, "unknown length policy 'gain'; choose one of fixed, .* expected_gain, node_gain"),
        ({"length": "fixed="}, "length fixed=: '' is not a number"),
        ({"verifier": "nope"}, "unknown verifier 'nope'"),
    ],
)
def test_mistakes_are_named_before_anything_runs(changed: dict[str, Any], message: str) -> None:
    given = {"prompts": [[3], [4, 5]], "max_new_tokens": NUM_NEW} | changed
    with pytest.raises(ValueError, match=message):
        draftsmith.generate_stream(tiny_target("llama"), given.pop("prompts"), **given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"generation_config": {"num_return_sequences": 2, "temperature": 1.0}}, "num_return_sequences is 2; a stream"),
        ({"generation_config": {"output_scores": True}}, "output_scores is not supported in streams"),
        ({"generation_config": {"guidance_scale": 2.0}}, "UnbatchedClassifierFreeGuidance.* runs the model on another"),
        ({"generation_config": {"num_beams": 2}}, "num_beams is 2"),
        ({"generation_config": {"min_q": 2}}, "has no setting 'min_q'; did you mean 'min_p'"),
        ({"logits_processor": 3}, "logits_processor is 3; it must be a logits processor or a list"),
        ({"stop_strings": "x"}, "the target has no tokenizer"),
        ({"stopping_criteria": [lambda ids, scores: False]}, "not supported for 32 rows"),
        ({"batch_invariant": "yes"}, "batch_invariant is 'yes'; it must be True, False or None"),
    ],
)
def test_settings_that_streams_do_not_have_are_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draftsmith.generate_stream(tiny_target("llama"), [[3], [4, 5]], **given)


def test_a_text_without_any_token_left_is_named() -> None:
    def all_but_prompt_5(prefix_BT: torch.Tensor, scores_BV: torch.Tensor) -> torch.Tensor:
        return scores_BV.masked_fill((prefix_BT[:, :1] == 5), -torch.inf)

    options = {"batch_size": 2, "max_new_tokens": 4, "logits_processor": all_but_prompt_5}
    texts = draftsmith.generate_stream(tiny_target("llama"), [[3], [4], [6], [5]], **options)
    with pytest.raises(ValueError, match=r"\(all_but_prompt_5\) leave no token after the first 1 of text 3"):
        list(texts)


def test_batches_of_a_tokenizer_are_taken_without_their_padding() -> None:
    target, rows = tiny_target("llama"), prompts(3)
    ids, mask = padded(rows, side="left")
    expected = [text.new_ids for text in draftsmith.generate_stream(target, rows, max_new_tokens=4)]
    kinds = [{"input_ids": ids, "attention_mask": mask}, [{"input_ids": row} for row in rows], map(torch.tensor, rows)]
    for given in kinds:
        texts = draftsmith.generate_stream(target, given, max_new_tokens=4)
        assert [text.new_ids for text in texts] == expected


def test_no_prompts_give_no_texts() -> None:
    assert list(draftsmith.generate_stream(tiny_target("llama"), [])) == []


def resident_mib() -> float:
    """Returns this process's resident memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads memory from Linux's /proc")
@pytest.mark.parametrize("drafter", ["none", "lookup", "copy", "medusa", "eagle3"])
def test_memory_does_not_grow_over_two_thousand_prompts(drafter: str) -> None:
    target, found = tiny_target("llama"), []
    made: dict[str, Any] = {"none": None, "lookup": lookup.Drafter(lookup.Config(), target)}
    drafting = made[drafter] if drafter in made else tiny_drafter(drafter, "llama")
    many = (prompt for _ in range(200) for prompt in prompts(10, seed=4))
    for text in draftsmith.generate_stream(target, many, drafting, batch_size=8, max_new_tokens=24, eos_token_id=EOS):
        assert text.new_ids
        found.append(resident_mib())
    assert len(found) == 2_000
    assert max(found[1000:]) - max(found[:1000]) < 8, "MiB"
