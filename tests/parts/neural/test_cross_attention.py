"""Tests of cross-attention to the source and of the copy mechanism, against values by hand.

Shape suffixes: B rows, S source tokens, E width of the target's states, D width of the features, V vocabulary.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from draftsmith.core.target import Source
from draftsmith.parts.neural.cross_attention import CrossAttention

TARGET: Any = SimpleNamespace(name="t", is_encoder_decoder=True, hidden_size=6)
WIDTH, VOCAB_SIZE = 4, 9
TOKENS_BS = torch.tensor([[3, 5, 3, 8], [7, 2, 0, 0]])
LENGTHS = (4, 2)


def attention_and_source(copies: bool) -> tuple[CrossAttention, Source]:
    torch.manual_seed(0)
    mask_BS = torch.tensor([[1] * length + [0] * (4 - length) for length in LENGTHS])
    source = Source(tokens_BT=TOKENS_BS, mask_BT=mask_BS, encoded_BTD=5 * torch.randn(2, 4, 6))
    return CrossAttention(TARGET, WIDTH, 3, copies=copies), source


def by_hand(attention: CrossAttention, source: Source, row: int, features_D: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the features with the attention output added [D], and the attention weights [S]."""
    states_SE = source.encoded_BTD[row, : LENGTHS[row]]
    states_SE = states_SE / states_SE.pow(2).mean(-1, keepdim=True).sqrt()
    scores_S = torch.stack([features_D @ (attention.keys.weight @ state_E) / 2 for state_E in states_SE])
    attention_S = scores_S.softmax(0)
    return features_D + sum(
        a * (attention.values.weight @ e) for a, e in zip(attention_S, states_SE, strict=True)
    ), attention_S


def test_attend_matches_values_by_hand() -> None:
    attention, source = attention_and_source(copies=False)
    features_BMD = torch.randn(2, 3, WIDTH)
    projected = attention.project(source)
    assert projected is not None
    found_BMD = attention.attend(features_BMD, projected)
    for row in range(2):
        states_SE = torch.nn.functional.rms_norm(source.encoded_BTD[row, : LENGTHS[row]], (6,))
        expected_G = attention.summary(states_SE.mean(0))
        torch.testing.assert_close(projected.summary_BG[row], expected_G)
        for position in range(3):
            torch.testing.assert_close(
                found_BMD[row, position], by_hand(attention, source, row, features_BMD[row, position])[0]
            )
    assert torch.equal(attention.attend(features_BMD.flatten(0, 1), projected), found_BMD.flatten(0, 1))


def test_copy_head_matches_values_by_hand() -> None:
    """g softmax(logits) + (1 - g) attention: token 3 occurs twice in the first source and gets the sum of both."""
    attention, source = attention_and_source(copies=True)
    assert attention.gate is not None
    output_VD, features_BMD = torch.randn(VOCAB_SIZE, WIDTH), torch.randn(2, 3, WIDTH)
    carried = attention.attend(features_BMD, attention.project(source))
    logits_BMV = attention.copy_head(lambda features: features @ output_VD.T, source)(carried)
    for row in range(2):
        for position in range(3):
            found_D, attention_S = by_hand(attention, source, row, features_BMD[row, position])
            share = attention.gate(found_D).sigmoid()
            probs_V = share * (output_VD @ found_D).softmax(-1)
            for token, chance in zip(TOKENS_BS[row].tolist(), attention_S, strict=False):
                probs_V[token] = probs_V[token] + (1 - share[0]) * chance
            assert probs_V.sum().item() == pytest.approx(1)
            torch.testing.assert_close(logits_BMV[row, position].exp(), probs_V)
    # Positions selected from the batch, as losses do, still carry their row.
    picked_NV = attention.copy_head(lambda features: features @ output_VD.T, source)(
        carried[:, 1:].flatten(0, 1)[[3, 0]]
    )
    torch.testing.assert_close(picked_NV, torch.stack([logits_BMV[1, 2], logits_BMV[0, 1]]))
    picked_NV.sum().backward()
    assert all(weight.grad is not None for name, weight in attention.named_parameters() if "summary" not in name)


def test_loss_of_token_with_probability_zero_is_finite() -> None:
    attention, source = attention_and_source(copies=True)
    carried = attention.attend(torch.randn(2, 1, WIDTH), attention.project(source))
    surely_V = torch.full((VOCAB_SIZE,), -1e4)
    surely_V[1] = 0
    logits_BMV = attention.copy_head(lambda features: surely_V + 0 * features.sum(-1, keepdim=True), source)(carried)
    torch.nn.functional.cross_entropy(logits_BMV[:, 0], torch.tensor([6, 6])).backward()
    assert all(w.grad is None or w.grad.isfinite().all() for w in attention.parameters())


def test_causal_target_has_no_cross_attention() -> None:
    causal: Any = SimpleNamespace(name="t", is_encoder_decoder=False, hidden_size=6)
    attention, features = CrossAttention(causal, WIDTH, 3, copies=False), torch.randn(2, WIDTH)
    assert not list(attention.parameters()) and attention.project(None) is None
    assert attention.attend(features, None) is features and attention.copy_head(torch.sin, None) is torch.sin
    with pytest.raises(ValueError, match="copy is set, and target t is causal"):
        CrossAttention(causal, WIDTH, 3, copies=True)
