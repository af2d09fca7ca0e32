"""Processed logits of every node equal transformers' processors on that node's text, and texts equal `model.generate`.

Shape suffixes: B rows, N nodes, V vocabulary.
"""

from typing import Any

import pytest
import torch
from transformers import SynthIDTextWatermarkingConfig, WatermarkingConfig
from transformers.generation import logits_process as hf

import draftsmith
from draftsmith import Target
from draftsmith.core.sampling import Sampling
from draftsmith.core.tree import Draft, Tree
from draftsmith.inputs.processors import NodeProcessors, check_processors, for_rows, split_sampling
from tests.support.drafters import Scripted, tiny_drafter
from tests.support.models import SEQ2SEQ, VOCAB_SIZE, padded, prompts, tiny_model, tiny_target

ENDS = [2, 40]
NUM_NEW = 14
MANY = {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "min_new_tokens": 5, "renormalize_logits": True}
SETTINGS: list[dict[str, Any]] = [
    {"repetition_penalty": 1.6},
    {"no_repeat_ngram_size": 2},
    {"bad_words_ids": [[5], [7, 9], [28, 40]]},
    {"sequence_bias": {(5,): 3.0, (28, 8): 6.0, (9, 9, 9): -4.0}},
    {"suppress_tokens": list(range(3, 30))},
    {"min_new_tokens": 9, "sequence_bias": {(2,): 9.0}},
    {"exponential_decay_length_penalty": (3, 1.9)},
    {"begin_suppress_tokens": list(range(20))},
    {"forced_eos_token_id": 9},
    MANY,
    {"watermarking_config": WatermarkingConfig(bias=6.0)},
]
"""Settings that count tokens that are the same with and without padding."""
UNPADDED: list[dict[str, Any]] = [
    {"min_length": 14, "sequence_bias": {(2,): 9.0}},
    {"encoder_repetition_penalty": 2.0},
    {"encoder_no_repeat_ngram_size": 1},
    {"forced_bos_token_id": 12},
]


def shown(settings: dict[str, Any]) -> str:
    return "+".join(settings)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_scores_of_another_dtype_are_taken(dtype: torch.dtype) -> None:
    def cast(_: torch.Tensor, scores_BV: torch.Tensor) -> torch.Tensor:
        return scores_BV.to(dtype)

    target, rows = tiny_target("llama"), prompts(3)
    plain = draftsmith.generate(target, rows, max_new_tokens=8).sequences
    assert draftsmith.generate(target, rows, max_new_tokens=8, logits_processor=cast).sequences.equal(plain)


def by_lengths(prefix_BT: torch.Tensor, scores_BV: torch.Tensor) -> torch.Tensor:
    """A user's own processor: favours a token that depends on the number and sum of the ids."""
    token = (prefix_BT.sum(1) + prefix_BT.shape[1]) % VOCAB_SIZE
    return scores_BV.scatter_add(1, token[:, None], torch.full_like(scores_BV[:, :1], 4.0))


ALL = [
    hf.RepetitionPenaltyLogitsProcessor(1.4),
    hf.NoRepeatNGramLogitsProcessor(2),
    hf.NoBadWordsLogitsProcessor([[3, 4], [1]]),
    hf.SequenceBiasLogitsProcessor({(4, 2): 2.5, (6,): -1.0}),
    hf.MinLengthLogitsProcessor(6, [2]),
    hf.ExponentialDecayLengthPenalty((1, 1.5), [3], 4),
    hf.SuppressTokensAtBeginLogitsProcessor([0, 5], 6),
    by_lengths,
]


@pytest.mark.parametrize("processor", ALL, ids=lambda one: getattr(one, "__name__", type(one).__name__))
@pytest.mark.parametrize("shape", ["chain", "shared", "own"])
def test_each_node_is_processed_with_its_own_prefix(processor: Any, shape: str) -> None:
    """A row's committed tokens, the nodes above and the node itself; other branches and rows do not count."""
    generator = torch.Generator().manual_seed(0)
    parents = {
        "chain": [[-1, 0, 1, 2]],
        "shared": [[-1, 0, 0, 1, 1, 2, 3]],
        "own": [[-1, 0, 0, 1, 2], [-1, 0, 1, 2, 3], [-1, 0, 0, 0, 0]],
    }[shape]
    rows = [[4, 2, 3, 4, 2], [3], [1, 1, 3]]
    tree = Tree.from_parents(parents)
    tokens_BN = torch.randint(0, 8, (3, tree.num_nodes), generator=generator)
    tokens_BN[:, 0] = torch.tensor([row[-1] for row in rows])
    logits_BNV = torch.randn(3, tree.num_nodes, VOCAB_SIZE, generator=generator)
    given_BNV = logits_BNV.clone()
    process = NodeProcessors([[processor]] * 3)
    found_BNV = process(logits_BNV, Draft(tokens_BN=tokens_BN, tree=tree), rows, [True, False, True])
    assert torch.equal(logits_BNV, given_BNV)
    assert torch.equal(found_BNV[1], given_BNV[1]), "a finished row"
    for row in (0, 2):
        for node in range(tree.num_nodes):
            ancestors = tree.ancestors_RNN[row % len(parents), node].nonzero()[1:, 0].tolist()
            text = rows[row] + tokens_BN[row, ancestors].tolist()
            expected_1V = processor(torch.tensor([text]), given_BNV[row, node][None].clone())
            assert torch.equal(found_BNV[row, node], expected_1V[0]), (row, node)


def own_text(target: Target, prompt: list[int], settings: dict[str, Any], **more: Any) -> list[int]:
    """Returns transformers' new tokens for one prompt."""
    given = {"attention_mask": torch.ones(1, len(prompt)), "max_new_tokens": NUM_NEW, "pad_token_id": 0}
    out = target.model.generate(torch.tensor([prompt]), **{"eos_token_id": ENDS, **given, **settings, **more})
    return out[0, 1 if target.is_encoder_decoder else len(prompt) :].tolist()


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        *(("llama", settings) for settings in SETTINGS[:-1] + UNPADDED[:-1]),
        *((other, MANY) for other in ("gpt2", "gemma3_text", *SEQ2SEQ)),
        *(("t5", settings) for settings in UNPADDED[1:]),
    ],
    ids=lambda value: value if isinstance(value, str) else shown(value),
)
def test_greedy_text_equals_transformers(architecture: str, settings: dict[str, Any]) -> None:
    target, rows = tiny_target(architecture), prompts(3)
    new = [own_text(target, prompt, settings) for prompt in rows]
    start = [[0]] * 3 if target.is_encoder_decoder else rows
    expected = [[*begin, *one] for begin, one in zip(start, new, strict=True)]
    ids, mask = padded(rows)
    for trees in (False, True)[: 1 + target.takes_trees]:
        for num_rows in (1, 3):
            # Drafts go on where texts have ended.
            texts = [row + [3] * NUM_NEW for row in expected[:num_rows]]
            drafter = Scripted(target, texts, trees=trees, wrong_every=4)
            out = draftsmith.generate(
                target,
                ids[:num_rows],
                drafter,
                attention_mask=mask[:num_rows],
                max_new_tokens=NUM_NEW,
                generation_config={"eos_token_id": ENDS, **settings},
            )
            found = zip(out.sequences.tolist(), out.lengths.tolist(), strict=True)
            assert [row[:length] for row, length in found] == expected[:num_rows], (trees, num_rows)
            assert out.stats.tau > 1.5


@pytest.mark.parametrize("settings", [*SETTINGS, {"min_length": 20, "sequence_bias": {(2,): 9.0}}], ids=shown)
def test_padded_batches_equal_those_of_transformers(settings: dict[str, Any]) -> None:
    target = tiny_target("llama")
    ids, mask = padded(prompts(3), side="left")
    given = {"attention_mask": mask, "max_new_tokens": NUM_NEW, "pad_token_id": 0, "eos_token_id": ENDS} | settings
    own = target.model.generate(ids, **given)
    texts = [row[~is_pad].tolist() + [3] * NUM_NEW for row, is_pad in zip(own, _padding(own, mask), strict=True)]
    for trees in (False, True):
        drafter = Scripted(target, texts, trees=trees, wrong_every=4)
        found = target.model.generate(ids, custom_generate=draftsmith.custom_generate, drafter=drafter, **given)
        assert found.tolist() == own.tolist()


def _padding(sequences: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(mask == 0, (0, sequences.shape[1] - mask.shape[1]))


def test_users_own_processors_apply_before_sampling_settings() -> None:
    target, (prompt,) = tiny_target("llama"), prompts(1)
    expected = own_text(target, prompt, {}, logits_processor=hf.LogitsProcessorList([by_lengths]))
    plain = own_text(target, prompt, {})
    drafter = Scripted(target, [prompt + expected], trees=True)
    settings = {"max_new_tokens": NUM_NEW, "logits_processor": by_lengths, "eos_token_id": ENDS}
    assert draftsmith.generate(target, [prompt], drafter, **settings).sequences[0, len(prompt) :].tolist() == expected
    settings |= {"temperature": 0.5, "top_k": 1}
    assert draftsmith.generate(target, [prompt], drafter, **settings).sequences[0, len(prompt) :].tolist() == expected
    assert expected != plain


def test_prefix_constraints_and_processors_for_single_rows() -> None:
    target, rows = tiny_target("llama"), prompts(3)
    ids, mask = padded(rows, side="left")

    def allowed(row: int, prefix: torch.Tensor) -> list[int]:
        return [10 * row + (int(prefix[-1]) + step) % 10 for step in (1, 2, 5)]

    given = {"attention_mask": mask, "max_new_tokens": NUM_NEW, "pad_token_id": 0, "prefix_allowed_tokens_fn": allowed}
    own = target.model.generate(ids, **given)
    texts = [row[ids.shape[1] - len(p) :] for row, p in zip(own.tolist(), rows, strict=True)]
    drafter = Scripted(target, texts, trees=True)
    found = target.model.generate(ids, custom_generate=draftsmith.custom_generate, drafter=drafter, **given)
    assert found.tolist() == own.tolist()
    assert {int(token) // 10 for token in own[2, ids.shape[1] :]} == {2}


class Counting:
    """A processor that keeps state: it forbids the token with the number of its call."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, prefix_BT: torch.Tensor, scores_BV: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return scores_BV.index_fill(1, torch.tensor([self.calls % VOCAB_SIZE]), -torch.inf)


def failing(prefix_BT: torch.Tensor, scores_BV: torch.Tensor) -> torch.Tensor:
    raise KeyError("no such state")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"logits_processor": Counting()}, "Counting returns other scores when it is called again .* keeps state"),
        ({"logits_processor": failing}, "logits processor failing failed on a prefix of 9 tokens: 'no such state'"),
        ({"logits_processor": lambda ids, scores: scores[:, 1:]}, r"returned \(1, 63\); it must .* shape \(1, 64\)"),
        ({"logits_processor": [3]}, "logits processor int cannot be called"),
        ({"generation_config": {"guidance_scale": 2.0}}, "UnbatchedClassifierFreeGuidance.* runs the model on another"),
        ({"generation_config": {"watermarking_config": "synthid"}}, "SynthIDTextWatermark.* keeps the tokens"),
        (
            {"generation_config": {"bad_words_ids": [[token] for token in range(64)]}},
            "leave no token after the first 9",
        ),
        ({"generation_config": {"repetition_penalty": -1.0}}, "repetition_penalty is -1.0; it must not be negative"),
        (
            {"logits_processor": lambda ids, scores: scores * torch.nan},
            r"\(<lambda>\) return scores that are NaN or inf",
        ),
        (
            {"generation_config": {"sequence_bias": {(5,): torch.inf}}},
            "SequenceBias.* return scores that are NaN or inf",
        ),
        ({"generation_config": {"bad_words_ids": [[70]]}}, "failed on a prefix.*vocabulary size is 64"),
    ],
)
def test_what_cannot_be_applied_is_rejected_by_name(given: dict[str, Any], message: str) -> None:
    if given.get("generation_config", {}).get("watermarking_config") == "synthid":
        given = {"generation_config": {"watermarking_config": SynthIDTextWatermarkingConfig([1, 2, 3], 2)}}
    with pytest.raises(ValueError, match=message) as error:
        draftsmith.generate(tiny_target("llama"), prompts(1), max_new_tokens=4, eos_token_id=(), **given)
    assert "\n" not in str(error.value)


def only_until(length: int) -> Any:
    """Returns a processor that allows token 7 alone, and no token after `length` tokens."""

    def process(prefix_BT: torch.Tensor, scores_BV: torch.Tensor) -> torch.Tensor:
        allowed = torch.arange(VOCAB_SIZE) == (7 if prefix_BT.shape[1] < length else -1)
        return scores_BV.masked_fill(~allowed, -torch.inf)

    return process


def test_no_token_left_is_an_error_only_where_text_arrives() -> None:
    """Drafted nodes may lie beyond the last token that is generated."""
    target, (prompt,) = tiny_target("llama"), prompts(1)
    settings = {"eos_token_id": (), "logits_processor": only_until(len(prompt) + 4)}
    for temperature in (0.0, 1.0):
        drafter = Scripted(target, [prompt + [7] * 20], trees=False)
        out = draftsmith.generate(target, [prompt], drafter, max_new_tokens=4, temperature=temperature, **settings)
        assert out.sequences[0, len(prompt) :].tolist() == [7] * 4
        with pytest.raises(ValueError, match=r"\(process\) leave no token after the first 13 of text 0; relax"):
            draftsmith.generate(target, [prompt], drafter, max_new_tokens=5, temperature=temperature, **settings)


def test_split_sampling_takes_the_end_of_the_list_that_sampling_applies() -> None:
    penalty = hf.RepetitionPenaltyLogitsProcessor(1.2)
    warm, top_k, top_p, min_p = (
        hf.TemperatureLogitsWarper(0.7),
        hf.TopKLogitsWarper(20),
        hf.TopPLogitsWarper(0.8),
        hf.MinPLogitsWarper(0.1),
    )
    rest, sampling = split_sampling([penalty, warm, top_k, top_p, min_p, hf.LogitNormalization()], is_sampling=True)
    assert rest == [penalty] and sampling == Sampling(temperature=0.7, top_k=20, top_p=0.8, min_p=0.1)
    assert split_sampling([penalty], is_sampling=True) == ([penalty], Sampling(temperature=1.0))
    # A user's top-k before the temperature, and a watermark after it, stay in the list.
    assert split_sampling([top_k, warm, top_p], is_sampling=True) == ([top_k], Sampling(temperature=0.7, top_p=0.8))
    assert split_sampling([warm, top_k, penalty], is_sampling=True) == (
        [warm, top_k, penalty],
        Sampling(temperature=1.0),
    )
    assert split_sampling([top_k, top_k], is_sampling=True) == ([top_k], Sampling(temperature=1.0, top_k=20))
    kept = hf.TopKLogitsWarper(3, min_tokens_to_keep=2)
    assert split_sampling([kept], is_sampling=True)[0] == [kept]
    assert split_sampling([penalty, warm], is_sampling=False) == ([penalty, warm], Sampling())


def test_for_rows_shares_processors_that_are_the_same_for_all_rows() -> None:
    shared, minimum = hf.NoRepeatNGramLogitsProcessor(2), hf.MinNewTokensLengthLogitsProcessor(9, 4, [2])
    rows = for_rows([shared, minimum], [0, 6, 6], [[1]] * 3, are_lengths_padded=True)
    assert [row[0] for row in rows] == [shared] * 3
    assert rows[0][1] is minimum and rows[1][1] is rows[2][1]
    assert [row[1].prompt_length_to_skip for row in rows] == [9, 3, 3] and minimum.prompt_length_to_skip == 9


def test_for_rows_leaves_lengths_of_users_own_processors() -> None:
    own, built = (hf.RepetitionPenaltyLogitsProcessor(1.2, prompt_ignore_length=4) for _ in range(2))
    rows = for_rows([own, built], [0, 3], [[1]] * 2, unpadded=[own], are_lengths_padded=False)
    assert [[one.prompt_ignore_length for one in row] for row in rows] == [[4, 4], [4, 1]]
    too_short = hf.RepetitionPenaltyLogitsProcessor(1.2, prompt_ignore_length=torch.tensor([4]))
    with pytest.raises(ValueError, match="has an entry for 1 rows, none for row 1"):
        for_rows([too_short], [0, 0], [[1]] * 2, are_lengths_padded=False)


def test_check_processors_takes_one_or_several() -> None:
    one = hf.NoRepeatNGramLogitsProcessor(2)
    for given in (one, [one], (one,), hf.LogitsProcessorList([one])):
        assert check_processors(given) == [one]
    assert check_processors(None) == []


def test_targets_of_low_precision_are_processed_in_float32() -> None:
    """As by transformers: in bfloat16 a penalty would be rounded."""
    target = Target(tiny_model("llama").to(torch.bfloat16))
    expected = own_text(target, prompts(1)[0], {"repetition_penalty": 1.05})
    settings = {"repetition_penalty": 1.05, "eos_token_id": ENDS}
    out = draftsmith.generate(target, prompts(1), max_new_tokens=NUM_NEW, generation_config=settings)
    assert out.sequences[0, 9:].tolist() == expected


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_coupled_text_under_processors_is_the_same_for_every_drafter_and_streamed(temperature: float) -> None:
    """By seed alone, whether drafted or not, and in batches or row by row with a streamer."""

    class Streamed:
        def __init__(self) -> None:
            self.ids: list[int] = []

        def put(self, tokens: torch.Tensor) -> None:
            self.ids += tokens.tolist()

        def end(self) -> None:
            pass

    target, rows = tiny_target("llama"), prompts(3)
    settings: dict[str, Any] = {"verifier": "coupled", "temperature": temperature, "max_new_tokens": NUM_NEW}
    settings["generation_config"] = {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2, "min_p": 0.05}
    settings["logits_processor"] = by_lengths
    plain, *drafted = (
        draftsmith.generate(target, rows, drafter, seed=[1, 2, 3], **settings)
        for drafter in (None, tiny_drafter("lookup", "llama"), tiny_drafter("copy", "llama"))
    )
    assert all(one.sequences.equal(plain.sequences) for one in drafted)
    for row, prompt in enumerate(rows):
        streamer = Streamed()
        out = draftsmith.generate(
            target, [prompt], tiny_drafter("copy", "llama"), seed=[row + 1], streamer=streamer, **settings
        )
        assert streamer.ids == out.sequences[0].tolist() == plain.sequences[row, : plain.lengths[row]].tolist()
