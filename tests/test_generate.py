"""`generate`: greedy identity per drafter and architecture, end tokens, limits, streaming, seeds, statistics."""

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BatchEncoding, GenerationConfig, TextStreamer

import draftsmith
from draftsmith import Target
from draftsmith.drafters import lm, lookup, medusa
from tests.support.drafters import HEADS, NUM_NEW, Scripted, generate_rows, tiny_drafter
from tests.support.family import Watched, built, texts
from tests.support.models import (
    CAUSAL,
    CONTEXT,
    SEQ2SEQ,
    VOCAB_SIZE,
    greedy_by_transformers,
    padded,
    prompts,
    tiny_config,
    tiny_model,
    tiny_target,
    tiny_tokenizer,
)


@pytest.mark.parametrize("architecture", CAUSAL)
@pytest.mark.parametrize("drafter", ["none", "copy", "scripted"])
def test_greedy_output_equals_transformers(architecture: str, drafter: str) -> None:
    target = tiny_target(architecture)
    for num_rows, side in ((1, "right"), (5, "left"), (5, "right")):
        expected = greedy_by_transformers(architecture, num_rows, NUM_NEW)
        if drafter == "none":
            out = generate_rows(target, num_rows, side=side)
        elif drafter == "scripted":
            out = generate_rows(
                target, num_rows, Watched(Scripted(target, expected, trees=True, wrong_every=7)), side=side
            )
            assert out.stats.tau > 2, "paths of several nodes must have been gathered"
        else:
            out = generate_rows(target, num_rows, Watched(tiny_drafter("copy", architecture)), side=side)
            assert out.stats.tau > 1.5, "drafts of a near copy must often be accepted"
        assert texts(out) == expected, (num_rows, side)
        assert out.lengths.tolist() == [len(row) for row in expected]


@pytest.mark.parametrize("architecture", SEQ2SEQ)
@pytest.mark.parametrize("drafter", ["none", "lookup", "scripted"])
def test_greedy_output_equals_transformers_for_encoder_decoders(architecture: str, drafter: str) -> None:
    target = tiny_target(architecture)
    for num_rows, side in ((1, "right"), (5, "left"), (5, "right")):
        expected = greedy_by_transformers(architecture, num_rows, NUM_NEW)
        if drafter == "scripted":
            out = generate_rows(target, num_rows, Scripted(target, expected, trees=False, wrong_every=5), side=side)
            assert out.stats.tau > 2
        else:
            out = generate_rows(
                target, num_rows, tiny_drafter("lookup", architecture) if drafter == "lookup" else None, side=side
            )
        assert texts(out) == expected, (num_rows, side)


@pytest.mark.parametrize(("wrong_every", "accepted"), [(0, 4), (1, 0), (2, 1), (3, 2)])
def test_statistics_of_drafts_with_known_errors(wrong_every: int, accepted: int) -> None:
    """One row whose text is known: every count follows from which drafted tokens are wrong."""
    target, (expected,) = tiny_target("llama"), greedy_by_transformers("llama", 1, 61 - 9)
    prompt = torch.tensor(prompts(1))
    if wrong_every:
        # After a prompt of 6 tokens each draft's first wrong token is at the same depth.
        prompt = prompt[:, :6]
        expected = texts(draftsmith.generate(target, prompt, max_new_tokens=40))[0]
    drafter = Scripted(target, [expected], trees=False, wrong_every=wrong_every)
    num_new = 5 * (accepted + 1)
    out = draftsmith.generate(target, prompt, drafter, max_new_tokens=num_new)
    assert texts(out)[0] == expected[: prompt.shape[1] + num_new]
    assert out.stats.steps == 5
    assert out.stats.tau == accepted + 1
    # At most four tokens deep, and at most the number of remaining tokens without the target's own.
    reached = [min(4, (accepted + 1) * left - 1) for left in (5, 4, 3, 2, 1)]
    assert out.stats.drafted == [sum(deepest >= depth for deepest in reached) for depth in range(1, 5)]
    assert out.stats.accepted_per_depth == [float(depth <= accepted) for depth in range(1, 5)]


def test_statistics_are_consistent() -> None:
    target = tiny_target("llama")
    for name in ("none", "medusa", "copy", "lookup"):
        stats = (out := generate_rows(target, 5, tiny_drafter(name, "llama") if name != "none" else None)).stats
        num_prompt = sum(map(len, prompts(5)))
        assert stats.num_rows == 5
        assert stats.new_tokens == int(out.lengths.sum()) - num_prompt == 5 * NUM_NEW
        assert stats.tau == stats.new_tokens / stats.steps
        assert len(stats.accepted_per_depth) == len(stats.drafted) == len(stats.accepted)
        assert all(0 <= share <= 1 for share in stats.accepted_per_depth)
        assert sorted(stats.accepted, reverse=True) == stats.accepted, "counts must not increase with depth"
        # Every step commits one token of the target besides the accepted ones; the last may be cut to the limit.
        assert stats.new_tokens <= stats.steps + sum(stats.accepted)
        if name == "none":
            assert (stats.steps, stats.tau, stats.drafted) == (5 * NUM_NEW, 1.0, [])
        for milliseconds in (stats.prefill_ms, stats.draft_ms, stats.verify_ms, stats.commit_ms):
            assert milliseconds > 0
    assert stats.verify_ms > stats.commit_ms, "it includes the target's forward"


@pytest.mark.parametrize("drafter", ["none", "medusa", "copy", "lookup", "scripted"])
def test_generation_stops_at_an_end_token_inside_an_accepted_draft(drafter: str) -> None:
    target, whole = tiny_target("mistral"), greedy_by_transformers("mistral", 5, NUM_NEW)
    num_prompt = [len(prompt) for prompt in prompts(5)]
    # End tokens at different positions of the rows' texts, and in one row none.
    ends = (whole[0][num_prompt[0] + 2], whole[1][num_prompt[1] + 9])
    expected = []
    for row, size in zip(whole, num_prompt, strict=True):
        stops = [at + 1 for at in range(size, len(row)) if row[at] in ends]
        expected.append(row[: min(stops, default=len(row))])
    assert len({len(row) - size for row, size in zip(expected, num_prompt, strict=True)}) >= 3
    kind = Scripted(target, whole, trees=True) if drafter == "scripted" else None
    used = kind or (tiny_drafter(drafter, "mistral") if drafter != "none" else None)
    out = generate_rows(target, 5, used, eos_token_id=ends)
    assert texts(out) == expected
    assert out.stats.new_tokens == sum(map(len, expected)) - sum(num_prompt)
    padding = [out.sequences[row, len(ids) :] for row, ids in enumerate(expected)]
    assert all((rest == 0).all() for rest in padding), "right-padded with the model's padding token"
    assert texts(generate_rows(target, 5, used, eos_token_id=ends[0]))[0] == expected[0]


def test_eos_token_id_defaults_to_the_model_and_can_be_turned_off() -> None:
    model = tiny_model("llama")
    whole = greedy_by_transformers("llama", 1, NUM_NEW)[0]
    model.generation_config.eos_token_id = [whole[9 + 4], VOCAB_SIZE - 1]
    first = whole.index(whole[9 + 4], 9)
    target = Target(model)
    assert texts(generate_rows(target, 1)) == [whole[: first + 1]]
    assert texts(generate_rows(target, 1, eos_token_id=())) == [whole]


@pytest.mark.parametrize("drafter", ["none", "medusa", "lm", "copy", "lookup", "scripted"])
@pytest.mark.parametrize("num_new", [1, 2, 3, 7])
def test_max_new_tokens_is_reached_exactly(drafter: str, num_new: int) -> None:
    target, whole = tiny_target("llama"), greedy_by_transformers("llama", 5, NUM_NEW)
    used: Any = Scripted(target, whole, trees=True) if drafter == "scripted" else None
    used = used or (tiny_drafter(drafter, "llama") if drafter != "none" else None)
    out = generate_rows(target, 5, used, max_new_tokens=num_new)
    expected = [row[: len(row) - NUM_NEW + num_new] for row in whole]
    assert texts(out) == expected


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "bart"])
@pytest.mark.parametrize("drafter", ["none", "medusa", "lm", "lookup"])
def test_text_may_fill_the_whole_context(architecture: str, drafter: str) -> None:
    if architecture in SEQ2SEQ and drafter in ("medusa", "lm"):
        return
    target, rows = tiny_target(architecture), [prompts(4)[3], prompts(4)[3][:5]]
    used = tiny_drafter(drafter, architecture) if drafter != "none" else None
    num_prompt = 1 if target.is_encoder_decoder else len(rows[0])
    ids, mask = padded(rows, side="left")
    out = draftsmith.generate(target, ids, used, attention_mask=mask, max_new_tokens=CONTEXT - num_prompt)
    given = {"attention_mask": mask} if target.is_encoder_decoder else {}
    reference = ids if target.is_encoder_decoder else torch.tensor(rows[:1])
    settings = {"max_new_tokens": CONTEXT - num_prompt, "do_sample": False}
    expected = target.model.generate(reference, **given, **settings)
    assert out.sequences[0, :CONTEXT].tolist() == expected[0].tolist()
    with pytest.raises(ValueError, match="does not fit the target's context of 64"):
        draftsmith.generate(target, ids, used, attention_mask=mask, max_new_tokens=CONTEXT - num_prompt + 1)


@pytest.mark.parametrize("drafter", ["none", "medusa", "copy", "lookup"])
def test_prompts_of_one_token(drafter: str) -> None:
    target = tiny_target("qwen2")
    used = tiny_drafter(drafter, "qwen2") if drafter != "none" else None
    expected = target.model.generate(torch.tensor([[7]]), do_sample=False, max_new_tokens=NUM_NEW)
    for num_rows in (1, 3):
        out = draftsmith.generate(target, torch.tensor([[7]] * num_rows), used, max_new_tokens=NUM_NEW)
        assert texts(out) == expected.tolist() * num_rows


class Pieces:
    """A streamer that records its pieces."""

    def __init__(self) -> None:
        self.pieces: list[list[int]] = []
        self.ended = 0

    def put(self, piece: torch.Tensor) -> None:
        assert self.ended == 0
        self.pieces.append(piece.tolist())

    def end(self) -> None:
        self.ended += 1


@pytest.mark.parametrize("drafter", ["none", "copy"])
def test_streamed_pieces_make_up_the_output(drafter: str) -> None:
    streamer = Pieces()
    out = generate_rows(
        tiny_target("llama"), 1, tiny_drafter("copy", "llama") if drafter == "copy" else None, streamer=streamer
    )
    assert streamer.pieces[0] == prompts(1)[0], "the prompt comes first, as transformers' streamers expect"
    assert [token for piece in streamer.pieces for token in piece] == texts(out)[0]
    assert len(streamer.pieces) == 1 + out.stats.steps, "one piece per step"
    assert streamer.ended == 1


def test_transformers_streamers_print_the_text(capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = tiny_tokenizer()
    out = generate_rows(tiny_target("llama"), 1, streamer=TextStreamer(tokenizer, skip_prompt=True))
    assert capsys.readouterr().out.split() == tokenizer.decode(texts(out)[0][len(prompts(1)[0]) :]).split()


@pytest.mark.parametrize("drafter", ["none", "medusa", "copy", "lookup"])
def test_seeds_reproduce_text(drafter: str) -> None:
    target = tiny_target("llama")
    used = tiny_drafter(drafter, "llama") if drafter != "none" else None
    sampled = [texts(generate_rows(target, 5, used, temperature=1.0, seed=seed)) for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]
    torch.manual_seed(5)
    unseeded = [texts(generate_rows(target, 5, used, temperature=1.0)) for _ in range(2)]
    torch.manual_seed(5)
    assert unseeded[0] != unseeded[1]
    assert texts(generate_rows(target, 5, used, temperature=1.0)) == unseeded[0]


def test_outputs_can_be_used_in_training() -> None:
    target = tiny_target("llama")
    out = generate_rows(target, 2)
    loss = target.model(out.sequences, labels=out.sequences).loss
    loss.backward()
    target.model.zero_grad()


def test_calls_do_not_affect_later_ones() -> None:
    """A drafter is used for batches of different shapes, with a failed call in between."""
    target = tiny_target("llama")
    for name in ("medusa", "copy", "lookup"):
        drafter = tiny_drafter(name, "llama")
        first = texts(generate_rows(target, 5, drafter))
        with pytest.raises(ValueError, match="nosuch"):
            generate_rows(target, 2, drafter, temperature=1.0, verifier="nosuch")
        assert texts(generate_rows(target, 1, drafter)) == first[:1]
        assert texts(generate_rows(target, 5, drafter)) == first


def check_error(target: Target, ids: Any, message: str, **settings: Any) -> None:
    """Asserts that the call raises ValueError with one sentence that matches `message`."""
    with pytest.raises(ValueError, match=message) as error:
        draftsmith.generate(target, torch.as_tensor(ids), **{"max_new_tokens": 8} | settings)
    assert "\n" not in str(error.value)


def test_invalid_arguments_are_rejected() -> None:
    target, ids = tiny_target("llama"), [[4, 5, 6], [7, 8, 9]]
    check_error(
        target, [[4] * 60], "prompt 0 has 60 tokens, and with max_new_tokens=5 it does not fit", max_new_tokens=5
    )
    check_error(target, [[4] * 65], "does not fit the target's context of 64", max_new_tokens=1)
    check_error(target, ids, "prompt 1 is empty", attention_mask=torch.tensor([[1, 1, 1], [0, 0, 0]]))
    check_error(target, torch.zeros(1, 0, dtype=torch.long), "prompt 0 is empty")
    check_error(target, torch.zeros(0, 3, dtype=torch.long), r"input_ids has shape \(0, 3\)")
    check_error(target, [[[4, 5, 6]]], r"input_ids has shape \(1, 1, 3\); it must be \[batch, length\]")
    check_error(target, ids, "attention_mask has holes", attention_mask=torch.tensor([[1, 1, 1], [1, 0, 1]]))
    check_error(target, ids, "attention_mask has holes", attention_mask=torch.tensor([[0, 1, 0], [1, 1, 1]]))
    check_error(
        target,
        ids,
        r"attention_mask has shape \(1, 3\); it must be that of input_ids, \(2, 3\)",
        attention_mask=torch.ones(1, 3),
    )
    check_error(
        target, [[4, VOCAB_SIZE]], f"prompt 0 holds token {VOCAB_SIZE}; the target's vocabulary has {VOCAB_SIZE}"
    )
    check_error(target, [[4, -1]], "prompt 0 holds token -1")
    check_error(target, ids, "max_new_tokens is 0; it must be at least 1", max_new_tokens=0)
    check_error(target, ids, "top_p is 1.5; it must be above 0 and at most 1", temperature=1.0, top_p=1.5)
    check_error(target, ids, "temperature is -1; it must be 0", temperature=-1)
    check_error(target, ids, "unknown verifier 'nosuch'; choose one of auto, bild", verifier="nosuch")
    check_error(target, ids, "a streamer prints one row, but there are 2", streamer=Pieces())


def test_prompts_and_numbers_of_every_kind_are_accepted() -> None:
    target, rows = tiny_target("llama"), prompts(3)
    (ids, mask), whole = padded(rows, side="left"), greedy_by_transformers("llama", 5, NUM_NEW)
    expected = [row[: len(row) - NUM_NEW + 5] for row in whole[:3]]
    for given, settings in (
        (rows, {}),
        (tuple(map(tuple, rows)), {}),
        ([torch.tensor(row) for row in rows], {}),
        ([np.array(row) for row in rows], {"max_new_tokens": np.int64(5), "temperature": np.float32(0)}),
        (ids.numpy(), {"attention_mask": mask.numpy()}),
        (ids.tolist(), {"attention_mask": mask.bool().tolist()}),
        (ids.int(), {"attention_mask": mask.float(), "max_new_tokens": 5.0, "top_k": torch.tensor(0)}),
        (BatchEncoding({"input_ids": ids, "attention_mask": mask}), {}),
        (BatchEncoding({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]}), {"seed": np.int32(3)}),
        ({"input_ids": ids}, {"attention_mask": mask, "eos_token_id": np.array([], dtype=np.int64)}),
    ):
        out = draftsmith.generate(target, given, tiny_drafter("copy", "llama"), **{"max_new_tokens": 5} | settings)
        assert texts(out) == expected, type(given)
    for single in (rows[0], torch.tensor(rows[0]), np.array(rows[0]), {"input_ids": rows[0]}):
        assert texts(draftsmith.generate(target, single, max_new_tokens=5)) == expected[:1], "a single prompt"
    end = expected[0][len(rows[0])]
    for eos in (end, [end], (end,), {end}, np.int64(end), torch.tensor(end), torch.tensor([end])):
        out = draftsmith.generate(target, rows[:1], max_new_tokens=5, eos_token_id=eos)
        assert texts(out) == [expected[0][: len(rows[0]) + 1]], eos


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"input_ids": "a text"}, r"input_ids is 'a text'; pass what tokenizer\(text\) returns"),
        ({"input_ids": None}, "input_ids is None"),
        ({"input_ids": ["a text"]}, "input_ids holds 'a text'; it must hold token ids"),
        ({"input_ids": torch.ones(1, 3)}, "input_ids holds 1.0; it must hold token ids"),
        ({"input_ids": torch.ones(1, 3, dtype=torch.bool)}, "input_ids holds True"),
        ({"input_ids": [[4, 5], 6]}, r"input_ids is \[\[4, 5\], 6\]; it must be \[batch, length\]"),
        ({"input_ids": []}, r"input_ids is \[\]; it must be \[batch, length\]"),
        ({"input_ids": [[10**30]]}, "prompt 0 holds token 10+; the target's vocabulary has 64"),
        ({"input_ids": {"ids": [[4]]}}, "input_ids is a mapping of ids; it must hold 'input_ids'"),
        ({"attention_mask": "1 1"}, "attention_mask is '1 1'"),
        ({"attention_mask": [[1, 2]]}, "attention_mask holds 2; it must hold 1 for each token"),
        ({"attention_mask": [[0.0, -torch.inf]]}, "attention_mask holds -inf; it must hold 1 for each token"),
        ({"max_new_tokens": None}, "max_new_tokens is None; it must be a whole number"),
        ({"max_new_tokens": 2.5}, "max_new_tokens is 2.5; it must be a whole number"),
        ({"max_new_tokens": True}, "max_new_tokens is True; it must be a whole number"),
        ({"temperature": "1"}, "temperature is '1'; it must be a finite number"),
        ({"temperature": float("nan")}, "temperature is nan; it must be a finite number"),
        ({"top_p": "0.9"}, "top_p is '0.9'; it must be a finite number"),
        ({"top_k": 1.5}, "top_k is 1.5; it must be a whole number"),
        ({"seed": "one"}, "seed is 'one'; it must be a whole number"),
        ({"seed": 2**64}, f"seed is {2**64}; it must be a whole number of at most 64 bits"),
        ({"eos_token_id": "2"}, "eos_token_id is '2'; it must be a token id or a list of token ids"),
        ({"eos_token_id": [2, None]}, r"eos_token_id is \[2, None\]; it must be a token id"),
        ({"eos_token_id": torch.tensor([2.0])}, "eos_token_id is .*; it must be a token id"),
        ({"eos_token_id": -1}, r"eos_token_id holds -1; the target's vocabulary has 64, and \(\) turns it off"),
        ({"verifier": None}, "verifier is None; it must be the name of one, or 'auto'"),
        ({"length": 4}, "length is 4; it must be a length policy or its name, such as 'fixed=4'"),
        ({"streamer": print}, r"streamer is <.*>; it must have the methods put\(tokens\) and end\(\)"),
        ({"drafter": "runs/medusa"}, "drafter is 'runs/medusa'; pass the drafter that draftsmith.load"),
        ({"target": "a/name"}, "target is 'a/name'; pass draftsmith.Target.from_pretrained"),
        ({"target": tiny_target("llama").model}, "target is a LlamaForCausalLM; pass draftsmith.Target"),
    ],
)
def test_arguments_of_another_kind_are_rejected(settings: dict[str, Any], message: str) -> None:
    given = {"target": tiny_target("llama"), "input_ids": [[4, 5]], "max_new_tokens": 4} | settings
    with pytest.raises(ValueError, match=message) as error:
        draftsmith.generate(**given)
    assert "\n" not in str(error.value)


def test_padding_may_hold_any_id() -> None:
    """Masked ids are ignored, even those outside the vocabulary that some tokenizers pad with."""
    target, rows = tiny_target("llama"), prompts(2)
    ids, mask = padded(rows, side="left")
    ids[mask == 0] = -100
    assert texts(draftsmith.generate(target, ids, attention_mask=mask.bool(), max_new_tokens=4)) == [
        row[: len(row) - NUM_NEW + 4] for row in greedy_by_transformers("llama", 2, NUM_NEW)
    ]


def test_a_verifier_that_does_not_support_the_draft_is_rejected() -> None:
    target = tiny_target("llama")
    for name, verifier in (("lm", "deterministic"), ("medusa", "token"), ("lookup", "greedy")):
        with pytest.raises(ValueError, match=f"verifier '{verifier}'"):
            generate_rows(target, 1, tiny_drafter(name, "llama"), temperature=1.0, verifier=verifier)


def test_typical_acceptance_is_greedy_at_temperature_0() -> None:
    out = generate_rows(tiny_target("llama"), 5, tiny_drafter("copy", "llama"), verifier="typical")
    assert texts(out) == greedy_by_transformers("llama", 5, NUM_NEW)


def test_draft_model_with_a_shorter_context() -> None:
    """Past its context the small model drafts nothing or badly; the text stays the target's."""
    target = tiny_target("llama")
    small = tiny_config("gpt2", n_positions=16, n_layer=1).to_dict()
    drafter = built(lm, lm.Config(model=small, num_draft=4, length="fixed"), target)
    for num_rows in (1, 5):
        assert texts(generate_rows(target, num_rows, drafter)) == greedy_by_transformers("llama", num_rows, NUM_NEW)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2"])
def test_target_in_bfloat16(architecture: str) -> None:
    target = Target(tiny_model(architecture).to(torch.bfloat16))
    small = lm.Config(model=tiny_config("llama", num_hidden_layers=1).to_dict(), length="fixed")
    for drafter in (built(medusa, HEADS, target), built(lm, small, target)):
        assert {weight.dtype for weight in drafter.parameters()} == {torch.bfloat16}
        for temperature in (0.0, 1.0):
            out = generate_rows(target, 5, Watched(drafter), temperature=temperature, seed=0)
            assert out.stats.new_tokens == 5 * NUM_NEW


def test_a_long_prompt_is_prefilled_in_chunks_and_grows_the_cache() -> None:
    """600 tokens are more than a prefill chunk and the cache's first capacity."""
    model = tiny_model("mistral", max_position_embeddings=1_000)
    target = Target(model)
    rows = [(prompts(4)[3] * 50)[:600], prompts(2)[1]]
    ids, mask = padded(rows)
    for drafter in (None, lookup.Drafter(lookup.Config(), target)):
        out = draftsmith.generate(target, ids, drafter, attention_mask=mask, max_new_tokens=12)
        for row, found in zip(rows, texts(out), strict=True):
            assert found == model.generate(torch.tensor([row]), do_sample=False, max_new_tokens=12)[0].tolist()


def test_settings_of_the_generation_config_that_are_not_applied_are_named() -> None:
    model = tiny_model("llama")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draftsmith.generate(Target(model), [[4]], max_new_tokens=1)
    for name, value in (("repetition_penalty", 1.3), ("no_repeat_ngram_size", 2), ("suppress_tokens", [5])):
        model.generation_config = GenerationConfig(pad_token_id=0, **{name: value})
        with pytest.warns(UserWarning, match=rf"{name}=.*, which are not applied"):
            draftsmith.generate(Target(model), [[4]], max_new_tokens=1)
