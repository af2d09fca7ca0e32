"""Text that drafters write alone: its law, what it depends on, and the batches that it goes into."""

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
from tests.support.family import built
from tests.support.models import SEQ2SEQ, VOCAB_SIZE, prompts, tiny_config, tiny_target
from tests.support.recurrent_checks import fresh_logits
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
    """Returns one of each family that is distilled, two of them such as draft trees elsewhere."""
    reading = [built(family, config, target) for family, config in READING.items()]
    return reading if target.is_encoder_decoder else [*reading, draft_model(target, tree=((0,), (1,), (0, 0)))]


def logits(drafter: Any, ids: list[int]) -> Tensor:
    """Returns [T, V] of one parallel pass."""
    if isinstance(drafter, lm.Drafter):
        return drafter.model(torch.tensor([ids])).logits[0]
    return fresh_logits(drafter, ids)


def batch(target: Target, num_rows: int = 5, **changes: Any) -> Batch:
    """Returns rows whose supervised tokens, up to 12, have a gap, beginning with an unsupervised part or not."""
    rows = []
    for row, ids in enumerate(prompts(num_rows, seed=4)):
        text = ids + prompts(1, seed=row + 50)[0] + [5, 6, 7]
        mask = [(row == 1 or place >= len(ids)) and place != len(ids) + 2 for place in range(len(text))]
        source = prompts(1, seed=row + 70)[0][: 3 + row] if target.is_encoder_decoder else None
        rows.append(example(text, mask, f"row-{row}", source))
    return dataclasses.replace(collate(rows), **changes)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_it_is_drawn_from_the_drafters_law(temperature: float) -> None:
    """Three tokens by 4,000 seeds against the exact law, from parallel passes in float32."""
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
def test_a_row_is_written_as_it_would_be_alone(architecture: str) -> None:
    """Ragged prompts and limits, rows that end, at temperature 1; what it says of the drafter is as before."""
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


def test_greedily_it_is_the_likeliest_token_each_time() -> None:
    target = tiny_target("llama")
    for drafter in drafters(target):
        texts = generate_alone(drafter, target, prompts(3), limits=[9, 0, 4], seeds=[0, 0, 0], temperature=0.0)
        assert [len(text) for text in texts] == [18, 3, 5]
        for prompt, text in zip(prompts(3), texts, strict=True):
            for length in range(len(prompt), len(text)):
                with torch.no_grad():
                    assert text[length] == logits(drafter, text[:length])[-1].argmax()


def test_what_becomes_of_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts and other rows stay, features go, all that is written is supervised, and an end ends a row."""
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
        assert found.loss_mask_BT[row].tolist() == [prompt_length <= place < length for place in range(25)]
    end = int(found.tokens_BT[3, 16])
    monkeypatch.setattr(target, "eos_token_ids", (end,))
    ended = rewrite_rows(drafter, given, target, [1, 3], temperature=1.0, salt="")
    place = found.tokens_BT[3, 14:].tolist().index(end) + 14
    assert int(ended.lengths_B[3]) == place + 1 and ended.tokens_BT[3, place] == end
    assert rewrite_rows(drafter, given, target, [], temperature=1.0, salt="") is given
    few = rewrite_rows(drafter, given, target, [3], temperature=1.0, salt="", most_tokens=2)
    assert int(few.lengths_B[3]) == 16 and torch.equal(few.tokens_BT[3, :16], found.tokens_BT[3, :16])


def test_sources_stay_with_their_rows() -> None:
    target = tiny_target("t5")
    given = batch(target)
    found = rewrite_rows(drafters(target)[0], given, target, [2], temperature=1.0, salt="")
    assert torch.equal(found.source_BS, given.source_BS) and found.source is not None
    expected = complete(given, target).source
    assert expected is not None and torch.equal(found.source.encoded_BTD, expected.encoded_BTD)


def test_coins() -> None:
    """They fall by share, by row and by salt, the same for a row whatever stands beside it."""
    rows = [example([3, row % VOCAB_SIZE, row // VOCAB_SIZE], None, f"{row}") for row in range(2_000)]
    whole = collate(rows)
    assert on_policy.select_rows(0.0, whole, "1") == [] and len(on_policy.select_rows(1.0, whole, "1")) == 2_000
    one, other = (on_policy.select_rows(0.3, whole, salt) for salt in ("1", "2"))
    assert abs(len(one) / 2_000 - 0.3) < 5 * (0.21 / 2_000) ** 0.5
    assert abs(len({*one} & {*other}) / 2_000 - 0.09) < 5 * (0.09 * 0.91 / 2_000) ** 0.5
    assert [row + 1_000 for row in on_policy.select_rows(0.3, collate(rows[1_000:]), "1")] == [
        r for r in one if r >= 1_000
    ]


def test_the_cost_of_a_drafted_token() -> None:
    """A drafter as large as its target costs at least half a plain step, and more than those that are for drafting."""
    target = tiny_target("llama")
    whole = built(lm, lm.Config(model=target.model.config.to_diff_dict(), num_draft=4), target)
    with torch.no_grad():
        cost = on_policy.cost_ratio(whole, target)
        assert cost > 0.5
        assert all(0 < on_policy.cost_ratio(drafter, target) < cost for drafter in drafters(target)[:2])
        assert on_policy.cost_ratio(drafters(tiny_target("t5"))[0], tiny_target("t5")) > 0
