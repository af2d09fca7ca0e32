"""Batches: padding, order, the held-out split, and the check against the target."""

import dataclasses

import numpy as np
import pytest
import torch

from data.batches import (
    STEPS_SORTED,
    Example,
    batches,
    check_batch,
    collate,
    example,
    grouped_order,
    order,
    split,
    truncate,
)
from data.teacher import complete
from tests.support.models import SEQ2SEQ, VOCAB_SIZE, tiny_target

ROWS = [example([4, 5, 6, 7], [False, False, True, True], "a"), example([8, 9], None, "b")]


def with_features(row: Example, *, width: int = 32) -> Example:
    length = len(row.tokens_T)
    return dataclasses.replace(
        row,
        hidden={1: torch.ones(length, width, dtype=torch.bfloat16)},
        top_logits_TK=torch.ones(length, 3),
        top_ids_TK=torch.ones(length, 3, dtype=torch.long),
        log_normaliser_T=torch.ones(length),
    )


def test_collate_pads_rows_right():
    batch = collate(ROWS)
    assert batch.tokens_BT.tolist() == [[4, 5, 6, 7], [8, 9, 0, 0]]
    assert batch.loss_mask_BT.tolist() == [[False, False, True, True], [True, True, False, False]]
    assert batch.lengths_B.tolist() == [4, 2]
    assert batch.keys == ("a", "b")
    assert (batch.hidden, batch.top_ids_BTK) == ({}, None)


def test_collate_keeps_target_outputs_that_all_rows_have():
    batch = collate([with_features(row) for row in ROWS])
    assert batch.hidden[1].shape == (2, 4, 32)
    assert batch.hidden[1][1, 2:].eq(0).all()
    assert batch.top_ids_BTK.shape == batch.top_logits_BTK.shape == (2, 4, 3)
    mixed = collate([with_features(ROWS[0]), ROWS[1]])
    assert (mixed.hidden, mixed.top_ids_BTK) == ({}, None)


def test_batch_to_moves_every_tensor():
    moved = collate([with_features(row) for row in ROWS]).to("meta")
    tensors = [value for value in vars(moved).values() if isinstance(value, torch.Tensor)]
    assert {tensor.device.type for tensor in [*tensors, *moved.hidden.values()]} == {"meta"}
    assert len(tensors) == 6
    assert moved.keys == ("a", "b")


@pytest.mark.parametrize("mask", [[False, False], [True, False]])
def test_collate_rejects_a_loss_mask_of_zeros(mask):
    with pytest.raises(ValueError, match=r"the loss mask of row c is all zero"):
        collate([*ROWS, example([4, 5], mask, "c")])


def test_split_depends_on_key_and_seed_alone():
    keys = [f"key {number % 400}" for number in range(500)]
    train, held_out = split(keys, held_out_share=0.1, seed=1)
    assert sorted(train + held_out) == list(range(500))
    assert 20 < len(held_out) < 90
    assert not {keys[index] for index in train} & {keys[index] for index in held_out}
    among_fewer = {keys[index] for index in split(keys[:250], held_out_share=0.1, seed=1)[1]}
    assert among_fewer == {keys[index] for index in held_out} & set(keys[:250])
    assert split(keys, held_out_share=0.1, seed=2)[1] != held_out
    assert split(keys, held_out_share=0.0)[1] == []


def test_split_of_few_rows_holds_one_out():
    train, held_out = split(["a", "b", "c"], held_out_share=1e-6)
    assert (len(train), len(held_out)) == (2, 1)
    with pytest.raises(ValueError, match=r"leaves none of the 1 rows for training"):
        split(["a"], held_out_share=0.1)


def test_order_depends_on_seed_and_epoch():
    assert order(20, seed=1, epoch=2) == order(20, seed=1, epoch=2)
    assert sorted(order(20, seed=1, epoch=2)) == list(range(20))
    assert len({tuple(order(20, seed=seed, epoch=epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4
    rows = [example([number, number], None, str(number)) for number in range(3, 10)]
    in_order = [key for batch in batches(rows, 3) for key in batch.keys]
    shuffled = [key for batch in batches(rows, 3, seed=0) for key in batch.keys]
    assert in_order == [row.key for row in rows]
    assert shuffled != in_order
    assert sorted(shuffled) == sorted(in_order)


def test_check_batch_rejects_a_batch_that_does_not_fit_the_target():
    target = tiny_target("llama")
    batch = collate([with_features(row) for row in ROWS])
    check_batch(batch, target, layers=(1,), top_k=3)
    zero = dataclasses.replace(batch, loss_mask_BT=torch.zeros_like(batch.loss_mask_BT))
    foreign = collate([example([4, VOCAB_SIZE], None, "x")])
    long = collate([example([4] * 65, None, "x")])
    wide = collate([with_features(row, width=48) for row in ROWS])
    for bad, needed, message in (
        (zero, {}, "all zero in the batch of rows a, b"),
        (foreign, {}, f"token id {VOCAB_SIZE} is outside"),
        (long, {}, "a row of 65 tokens is longer than the target's context of 64"),
        (batch, {"layers": (4,)}, "hidden layer 4 does not exist; .* has layers 0 to 3"),
        (batch, {"layers": (1, 2)}, r"lacks hidden layers \[2\]; it has \[1\]"),
        (wide, {}, r"hidden layer 1 has shape \(2, 4, 48\); the target's width is 32"),
        (batch, {"top_k": 4}, "has the top 3 logits; 4 are needed"),
    ):
        with pytest.raises(ValueError, match=message):
            check_batch(bad, target, **needed)


# --- Sources of encoder-decoders ---------------------------------------------------------------------------------

PAIRS = [
    example([0, 5, 6, 2], [False, True, True, True], "a", [9, 10, 11, 12, 13, 14]),
    example([0, 7, 8, 9, 4, 5], [False, True, True, True, True, True], "b", [20, 21]),
]


def test_collate_pads_sources_separately():
    batch = collate(PAIRS)
    assert batch.source_BS.tolist() == [[9, 10, 11, 12, 13, 14], [20, 21, 0, 0, 0, 0]]
    assert batch.source_lengths_B.tolist() == [6, 2]
    assert batch.tokens_BT.shape == (2, 6)
    moved = complete(batch, tiny_target("t5")).to("meta")
    tensors = [*vars(moved).values(), *vars(moved.source).values()]
    assert {tensor.device.type for tensor in tensors if isinstance(tensor, torch.Tensor)} == {"meta"}
    with pytest.raises(AssertionError, match="cannot mix rows"):
        collate([PAIRS[0], ROWS[0]])


def test_truncate_keeps_the_source():
    row = truncate(dataclasses.replace(PAIRS[1], hidden={1: torch.ones(6, 4)}), 3)
    assert (row.tokens_T.tolist(), row.loss_mask_T.tolist()) == ([0, 7, 8], [False, True, True])
    assert row.hidden[1].shape == (3, 4)
    assert row.source_S.tolist() == [20, 21]
    assert truncate(PAIRS[0], 2).source_S.tolist() == [9, 10, 11, 12, 13, 14], "the source keeps its length"


def test_grouped_order_holds_each_row_once_and_groups_rows_by_their_cut_length():
    lengths = np.random.default_rng(0).integers(2, 60, size=203).tolist()
    rows = [example([5] * length, None, str(index)) for index, length in enumerate(lengths)]
    found = [list(grouped_order(rows, 4, 40, seed=1, epoch=epoch)) for epoch in (0, 1)]
    assert found[0] == list(grouped_order(rows, 4, 40, seed=1, epoch=0)) and found[0] != found[1]
    for indices in found:
        assert sorted(indices) == list(range(203))
        steps = [[min(lengths[index], 40) for index in indices[begin : begin + 4]] for begin in range(0, 200, 4)]
        assert sum(max(step) - min(step) for step in steps) < 0.1 * sum(map(max, steps))
        longest = [max(step) for step in steps[:STEPS_SORTED]]
        assert longest != sorted(longest), "the steps are shuffled"


@pytest.mark.parametrize("architecture", SEQ2SEQ)
def test_complete_encodes_the_source_of_each_row(architecture):
    """Hidden states and logits of a padded batch are those of transformers' own forward pass of each row alone."""
    target = tiny_target(architecture)
    batch = complete(collate(PAIRS), target, layers=(0, 2, 3), top_k=5)
    assert torch.equal(batch.source.mask_BT.sum(1), batch.source_lengths_B)
    for row, pair in enumerate(PAIRS):
        length = len(pair.tokens_T)
        inputs = {"input_ids": pair.source_S[None], "decoder_input_ids": pair.tokens_T[None]}
        out = target.model(**inputs, output_hidden_states=True)
        encoded = out.encoder_last_hidden_state[0]
        torch.testing.assert_close(batch.source.encoded_BTD[row, : len(encoded)], encoded, rtol=1e-4, atol=1e-5)
        for layer in (0, 2):
            states = out.decoder_hidden_states[layer][0]
            torch.testing.assert_close(batch.hidden[layer][row, :length], states, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(target.logits(batch.hidden[3])[row, :length], out.logits[0], rtol=1e-4, atol=1e-4)
        top = out.logits[0].topk(5)
        torch.testing.assert_close(batch.top_logits_BTK[row, :length], top.values, rtol=1e-4, atol=1e-4)
        assert torch.equal(batch.top_ids_BTK[row, :length], top.indices)
        assert not torch.isnan(batch.source.encoded_BTD).any()
    again = complete(dataclasses.replace(batch, source_BS=batch.source_BS + 1), target, layers=(2,))
    assert torch.equal(again.source.encoded_BTD, batch.source.encoded_BTD), "an encoded source is not encoded again"
    assert not batch.source.encoded_BTD.requires_grad


def test_complete_rejects_sources_that_do_not_fit_the_target():
    foreign = collate([example([0, 5], None, "x", [VOCAB_SIZE])])
    long = collate([example([0, 5], None, "x", [5] * 65)])
    empty = collate([example([0, 5], None, "x", []), PAIRS[0]])
    for bad, architecture, message in (
        (collate(ROWS), "t5", "is an encoder-decoder, and row a has no source for an encoder"),
        (collate(PAIRS), "llama", "is a causal model, and row a has a source for an encoder"),
        (foreign, "t5", f"token id {VOCAB_SIZE} is outside"),
        (long, "bart", "a row of 65 tokens is longer than the target's context of 64"),
        (empty, "t5", "one of the rows x, a has no token"),
    ):
        with pytest.raises(ValueError, match=message):
            complete(bad, tiny_target(architecture), layers=(1,))
