"""On-policy text: its distribution, its independence of other rows, and the batches with it."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from data.batches import Batch, collate, example
from data.teacher import complete
from draftsmith import Target
from draftsmith.drafters import cnn, lm, lstm
from tests.support.distributions import NUM_TOKENS, PROMPT, cells, distribution_target, p_value
from tests.support.families.recurrent_checks import fresh_logits
from tests.support.family import built
from tests.support.models import SEQ2SEQ, VOCAB_SIZE, prompts, tiny_config, tiny_target
from trainers.parts import on_policy
from trainers.parts.on_policy import generate_alone, rewrite_rows

READING = {
    lstm: lstm.Config(hidden_size=24, num_layers=2, rank=8, num_draft=4),
    cnn: cnn.Config(num_channels=24, rank=8, num_draft=4, width=2, num_nodes=5),
}
SMALL_LM = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}


def draft_model(target: Target, **changes: Any) -> Any:
    model = tiny_config("llama", **{"vocab_size": target.vocab_size, **SMALL_LM, "head_dim": 8}).to_diff_dict()
    return built(lm, lm.Config(model=model, num_draft=4, **changes), target)


def drafters(target: Target) -> list[Any]:
    """Returns one drafter of each distilled family, two of them configured for trees."""
    torch.manual_seed(0)  # some initial biases come from the global generator
    reading = [built(family, config, target) for family, config in READING.items()]
    return reading if target.is_encoder_decoder else [*reading, draft_model(target, tree=((0,), (1,), (0, 0)))]


def logits(drafter: Any, ids: list[int]) -> Tensor:
    """Returns logits [T, V] of one parallel pass."""
    if isinstance(drafter, lm.Drafter):
        return drafter.model(torch.tensor([ids])).logits[0]
    return fresh_logits(drafter, ids)


def batch(target: Target, num_rows: int = 5, **changes: Any) -> Batch:
    """Returns rows with up to 12 supervised tokens and a gap, with and without unsupervised prompts."""
    rows = []
    for row, ids in enumerate(prompts(num_rows, seed=4)):
        text = ids + prompts(1, seed=row + 50)[0] + [5, 6, 7]
        mask = [(row == 1 or position >= len(ids)) and position != len(ids) + 2 for position in range(len(text))]
        source = prompts(1, seed=row + 70)[0][: 3 + row] if target.is_encoder_decoder else None
        rows.append(example(text, mask, f"row-{row}", source))
    return dataclasses.replace(collate(rows), **changes)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_generate_alone_samples_the_drafters_distribution(temperature: float) -> None:
    """Three tokens with 4,000 seeds follow the exact distribution, from parallel passes in float32."""
    target, count = distribution_target(), 4_000
    for drafter in drafters(target):
        probs_C, rows = torch.ones(1, dtype=torch.float64), [PROMPT]
        for _ in range(NUM_TOKENS):
            with torch.no_grad():
                next_CV = torch.stack([logits(drafter, ids)[-1] for ids in rows]).double() / temperature
            probs_C = (probs_C[:, None] * next_CV.softmax(-1)).flatten()
            rows = [[*ids, token] for ids in rows for token in range(target.vocab_size)]
        given = {"limits": [NUM_TOKENS] * count, "seeds": range(count), "temperature": temperature}
        texts = torch.tensor(generate_alone(drafter, target, [PROMPT] * count, **given))
        counts_C = torch.bincount(cells(texts[:, len(PROMPT) :]), minlength=len(probs_C))
        assert p_value(counts_C.double(), probs_C) > 1e-4


@pytest.mark.parametrize("architecture", ["llama", *SEQ2SEQ])
def test_rows_are_independent_of_the_batch(architecture: str) -> None:
    """Prompts and limits of unequal lengths, rows that end, temperature 1; the drafter's state is restored."""
    target = tiny_target(architecture)
    for drafter in drafters(target):
        drafter.train()
        config, given = drafter.config, batch(target)
        together = rewrite_rows(drafter, given, target, range(5), temperature=1.0, salt="a")
        again = rewrite_rows(drafter, given, target, range(5), temperature=1.0, salt="b")
        assert drafter.config == config and drafter.training
        differ = []
        for row in range(5):
            alone = rewrite_rows(drafter, batch(target), target, [row], temperature=1.0, salt="a")
            length = int(together.lengths_B[row])
            assert length == alone.lengths_B[row]
            text = together.tokens_BT[row, :length]
            assert torch.equal(text, alone.tokens_BT[row, :length])
            differ.append(not torch.equal(text, again.tokens_BT[row, :length]))
        assert sum(differ) >= 2


def test_generate_alone_is_greedy_at_temperature_0() -> None:
    target = tiny_target("llama")
    for drafter in drafters(target):
        texts = generate_alone(drafter, target, prompts(3), limits=[9, 0, 4], seeds=[0, 0, 0], temperature=0.0)
        assert [len(text) for text in texts] == [18, 3, 5]
        for prompt, text in zip(prompts(3), texts, strict=True):
            for length in range(len(prompt), len(text)):
                with torch.no_grad():
                    assert text[length] == logits(drafter, text[:length])[-1].argmax()


def test_rewrite_rows_replaces_supervised_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts and other rows stay, features are dropped, new tokens are supervised, and rows stop at the end token."""
    target = tiny_target("llama")
    given = complete(batch(target), target, (target.num_layers,), 4)
    drafter = drafters(target)[0]
    found = rewrite_rows(drafter, given, target, [1, 3], temperature=1.0, salt="")
    assert not found.hidden and found.top_ids_BTK is None
    for row in (0, 2, 4):
        length = int(given.lengths_B[row])
        assert found.lengths_B[row] == length
        assert torch.equal(found.tokens_BT[row, :length], given.tokens_BT[row, :length])
        assert torch.equal(found.loss_mask_BT[row, :length], given.loss_mask_BT[row, :length])
        assert not found.loss_mask_BT[row, length:].any()
    for row, prompt_length in ((1, 1), (3, 14)):
        length = int(found.lengths_B[row])
        assert length - prompt_length == int(given.loss_mask_BT[row, prompt_length:].sum())
        assert torch.equal(found.tokens_BT[row, :prompt_length], given.tokens_BT[row, :prompt_length])
        assert found.loss_mask_BT[row].tolist() == [prompt_length <= position < length for position in range(25)]
    end = int(found.tokens_BT[3, 16])
    monkeypatch.setattr(target, "eos_token_ids", (end,))
    ended = rewrite_rows(drafter, given, target, [1, 3], temperature=1.0, salt="")
    position = found.tokens_BT[3, 14:].tolist().index(end) + 14
    assert int(ended.lengths_B[3]) == position + 1 and ended.tokens_BT[3, position] == end
    assert rewrite_rows(drafter, given, target, [], temperature=1.0, salt="") is given
    few = rewrite_rows(drafter, given, target, [3], temperature=1.0, salt="", most_tokens=2)
    assert int(few.lengths_B[3]) == 16 and torch.equal(few.tokens_BT[3, :16], found.tokens_BT[3, :16])


def test_rewrite_rows_keeps_sources() -> None:
    target = tiny_target("t5")
    given = batch(target)
    found = rewrite_rows(drafters(target)[0], given, target, [2], temperature=1.0, salt="")
    assert torch.equal(found.source_BS, given.source_BS) and found.source is not None
    expected = complete(given, target).source
    assert expected is not None and torch.equal(found.source.encoded_BTD, expected.encoded_BTD)


def test_select_rows_depends_on_share_row_and_salt() -> None:
    """The selection of a row does not depend on the other rows."""
    rows = [example([3, row % VOCAB_SIZE, row // VOCAB_SIZE], None, f"{row}") for row in range(2_000)]
    whole = collate(rows)
    assert on_policy.select_rows(0.0, whole, "1") == [] and len(on_policy.select_rows(1.0, whole, "1")) == 2_000
    one, other = (on_policy.select_rows(0.3, whole, salt) for salt in ("1", "2"))
    assert abs(len(one) / 2_000 - 0.3) < 5 * (0.21 / 2_000) ** 0.5
    assert abs(len({*one} & {*other}) / 2_000 - 0.09) < 5 * (0.09 * 0.91 / 2_000) ** 0.5
    assert [row + 1_000 for row in on_policy.select_rows(0.3, collate(rows[1_000:]), "1")] == [
        r for r in one if r >= 1_000
    ]


def test_cost_ratio_of_large_and_small_drafters() -> None:
    """A drafter as large as its target costs at least half a plain step, and more than small ones."""
    target = tiny_target("llama")
    whole = built(lm, lm.Config(model=target.model.config.to_diff_dict(), num_draft=4), target)
    with torch.no_grad():
        cost = on_policy.cost_ratio(whole, target)
        assert cost > 0.5
        assert all(0 < on_policy.cost_ratio(drafter, target) < cost for drafter in drafters(target)[:2])
        assert on_policy.cost_ratio(drafters(tiny_target("t5"))[0], tiny_target("t5")) > 0
