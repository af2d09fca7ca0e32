"""DFlash's trainer: its loss against blocks run one by one, its anchors, weights and metrics by hand.

Shape suffixes: B rows, T positions, K drafted tokens, V vocabulary.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from data.batches import Batch, collate, example
from data.teacher import complete
from draftsmith import Target
from draftsmith.loading.model_info import read_target_info
from tests.drafters.test_dflash import naive_bias, naive_block, naive_confidence
from tests.support.models import VOCAB_SIZE, scramble, tiny_model, tiny_target, tiny_tokenizer
from tests.support.runs import trainer_settings
from trainers import Needs, dflash
from trainers.dflash import Drafter, Settings
from trainers.parts.parallel.unused_token import unused_token

TARGET = tiny_target("llama")
SMALL = {"num_layers": 1, "num_kv_heads": 2, "block_size": 4, "num_anchors": 4}
PLAIN = trainer_settings(dflash, **SMALL)
SETTINGS = trainer_settings(dflash, **SMALL, markov_rank=3, confidence=True, text_steps=2)
"""What tests/trainers/test_every_trainer.py trains, so that its runs have steps of both kinds and both heads."""


def batch(num_rows: int = 3) -> Batch:
    """Returns rows of 6, 9 and 12 tokens whose loss masks begin at different positions and have a gap."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for row in range(num_rows):
        length = 6 + 3 * row
        mask = [position >= 1 + row and position != 5 for position in range(length)]
        rows.append(example(torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist(), mask, str(row)))
    return complete(collate(rows), TARGET, (*dflash.needs(PLAIN, TARGET).layers, TARGET.num_layers))


def perturbed(settings: Settings = PLAIN) -> Drafter:
    drafter = dflash.build(settings, TARGET)
    scramble(drafter, seed=1)
    dflash.begin_step(drafter, settings, 0, 1)
    shortlist = drafter.shared_head.shortlist
    if not shortlist.is_whole:
        shortlist.set_tokens(torch.arange(len(shortlist)) * VOCAB_SIZE // len(shortlist))
    return drafter


def weights_by_hand(settings: Settings, right: list[float]) -> list[float]:
    """Returns the weights of the slots of a block whose tokens have these probabilities of acceptance."""
    if settings.weights == "decay":
        return [math.exp(-slot / settings.decay) for slot in range(len(right))]
    products = [math.prod(0.5 * one + 0.5 for one in right[: slot + 1]) for slot in range(len(right))]
    return [sum(products[slot:]) for slot in range(len(right))]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"weights": "decay", "decay": 2.0, "shortlist": 40},
        {"loss": "lk", "shortlist": 40},
        {"markov_rank": 3, "shortlist": 40, "confidence": True},
        {"markov_rank": 3, "confidence": True, "loss": "lk"},
        {"confidence": True, "text_steps": 1, "loss": "lk"},
    ],
    ids=["dpace", "decay", "lk", "bias and confidence", "bias and confidence by lk", "text"],
)
def test_loss_and_gradients_equal_blocks_run_one_by_one(changes: dict[str, Any]) -> None:
    """Values agree to float32's rounding."""
    settings, given = trainer_settings(dflash, **SMALL | {"num_anchors": 2} | changes), batch(2)
    drafter = perturbed(settings)
    shortlist, num_draft = drafter.shared_head.shortlist, drafter.config.num_draft
    anchors_BM, is_block_BM = dflash.draw_anchors(given, settings.num_anchors, "0")
    slow = torch.zeros(())
    for row, length in enumerate(given.lengths_B.tolist()):
        mask_T, tokens_T = given.loss_mask_BT[row], given.tokens_BT[row]
        total, count = torch.zeros(()), 0
        for anchor in anchors_BM[row][is_block_BM[row]].tolist():
            hidden = {layer: states[row, :anchor] for layer, states in given.hidden.items()}
            if settings.text_steps:
                embedded = TARGET.model.get_input_embeddings().weight[tokens_T[:anchor]].detach()
                hidden = {layer: embedded * (layer == drafter.hidden_layers[0]) for layer in hidden}
            z_KD, logits_KV = naive_block(drafter, int(tokens_T[anchor]), hidden)
            losses, right, counted, errors = [], [], [], []
            for slot in range(num_draft):
                at = anchor + 1 + slot
                label = int(tokens_T[min(at, given.tokens_BT.shape[1] - 1)])
                student_V = logits_KV[slot][shortlist.rows(torch.arange(VOCAB_SIZE))]
                previous = int(tokens_T[min(at, given.tokens_BT.shape[1] - 1) - 1])
                student_V = (student_V + naive_bias(drafter, previous)).log_softmax(-1)
                is_supervised = at < length and bool(mask_T[at])
                if settings.loss == "ce" or settings.text_steps:
                    is_counted = is_supervised and bool(shortlist.contains(torch.tensor(label)))
                    index = int(shortlist.indices(torch.tensor(label))) if is_counted else 0
                    losses.append(-student_V[index])
                    right.append(float(student_V[index].detach().exp()))
                else:
                    is_counted = is_supervised
                    theirs_D = given.hidden[TARGET.num_layers][row, min(at, given.tokens_BT.shape[1] - 1) - 1]
                    theirs_V = TARGET.logits(theirs_D[None, None])[0, 0].detach()
                    theirs_V = theirs_V[shortlist.rows(torch.arange(VOCAB_SIZE))].softmax(-1)
                    overlap = torch.minimum(student_V.exp(), theirs_V).sum()
                    losses.append(-overlap.log())
                    right.append(float(overlap.detach()))
                counted.append(is_counted)
                if is_supervised and settings.config.confidence:
                    predicted = naive_confidence(drafter, z_KD[slot], previous)
                    errors.append((slot, predicted, right[-1] if is_counted else 0.0))
            weights = weights_by_hand(settings, right)
            for slot, weight in enumerate(weights):
                if counted[slot]:
                    total, count = total + weight * losses[slot], count + 1
            for slot, predicted, reached in errors:
                error = -reached * predicted.log() - (1 - reached) * (1 - predicted).log()
                total = total + weights[slot] * error
        supervised = [at for at in range(1, length) if mask_T[at]]
        slots = sum(
            sum(anchor + 1 + slot in supervised for slot in range(num_draft))
            for anchor in anchors_BM[row][is_block_BM[row]].tolist()
        )
        slow = slow + total * len(supervised) / slots
    expected = torch.autograd.grad(slow, list(drafter.parameters()))
    fast, metrics = dflash.loss(drafter, given, settings, TARGET)
    torch.testing.assert_close(fast, slow)
    found = torch.autograd.grad(fast, list(drafter.parameters()))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert all(count > 0 for _, count in metrics.values())


def test_anchors_precede_supervised_tokens_and_depend_on_the_row_alone() -> None:
    given = batch()
    anchors_BM, is_block_BM = dflash.draw_anchors(given, 4, "3")
    for row, key in enumerate(given.keys):
        alone = collate(
            [example(given.tokens_BT[row, :length].tolist(), mask, key) for length, mask in [_row(given, row)]]
        )
        found = anchors_BM[row][is_block_BM[row]]
        assert torch.equal(found, dflash.draw_anchors(alone, 4, "3")[0][0])
        assert given.loss_mask_BT[row, found + 1].all() and (found.diff() > 0).all()
    many = collate([example(list(range(3, 43)), None, "row")])
    assert len({tuple(dflash.draw_anchors(many, 4, str(step))[0][0].tolist()) for step in range(8)}) > 4


def _row(given: Batch, row: int) -> tuple[int, list[bool]]:
    length = int(given.lengths_B[row])
    return length, given.loss_mask_BT[row, :length].tolist()


def test_evaluate_counts_tokens_up_to_the_first_wrong_one() -> None:
    """With every token right a block of four accepts three; after one wrong label it accepts those before it."""
    given, drafter = batch(), perturbed()
    blocks = dflash.select_blocks(drafter, given, 4, "held out")
    drafted_AK = drafter.shared_head(blocks.z_AKD).argmax(-1)
    right_AK = (drafted_AK == blocks.labels_AK) & blocks.mask_AK
    whole = [all(row) for row in blocks.mask_AK.tolist()]
    runs = [next((slot for slot, is_right in enumerate(row) if not is_right), 3) for row in right_AK.tolist()]
    total, count = dflash.evaluate(drafter, given, PLAIN, TARGET)["acceptance"]
    assert (int(total), count) == (sum(run for run, one in zip(runs, whole, strict=True) if one), sum(whole))


def test_a_drafter_learns_a_text_by_heart() -> None:
    """Trained on one greedy text, it drafts it: anchors, positions and labels agree with those of decoding."""
    torch.manual_seed(0)
    settings = trainer_settings(dflash, **SMALL | {"num_anchors": 16})
    generator = torch.Generator().manual_seed(4)
    text = torch.randint(3, VOCAB_SIZE, (24,), generator=generator).tolist()
    given = collate([example(text, [at >= 4 for at in range(24)], "row")])
    given = complete(given, TARGET, dflash.needs(settings, TARGET).layers)
    drafter = dflash.build(settings, TARGET).train()
    optimizer = torch.optim.AdamW(drafter.parameters(), lr=1e-2)
    for step in range(60):
        dflash.begin_step(drafter, settings, step, 60)
        optimizer.zero_grad()
        loss, _ = dflash.loss(drafter, given, settings, TARGET)
        loss.backward()
        optimizer.step()
    total, count = dflash.evaluate(drafter.eval(), given, settings, TARGET)["acceptance"]
    assert total / count > 2.5


def test_steps_on_text_read_no_hidden_states_and_leave_the_others_weights_at_zero() -> None:
    """The loss needs the tokens alone, and the fusion then gives for the embedding what it was trained to give."""
    settings = trainer_settings(dflash, **SMALL, layers=[0, 2, 3], text_steps=3)
    assert dflash.step_needs(settings, TARGET, 2) == Needs()
    assert dflash.step_needs(settings, TARGET, 3) == dflash.needs(settings, TARGET)
    drafter, given = dflash.build(settings, TARGET), batch()
    dflash.begin_step(drafter, settings, 2, 8)
    loss, _ = dflash.loss(drafter, dataclasses.replace(given, hidden={}), settings, TARGET)
    loss.backward()
    width = TARGET.hidden_size
    assert drafter.fusion.weight.grad[:, :width].any() and not drafter.fusion.weight.grad[:, width:].any()
    given = complete(given, TARGET, drafter.hidden_layers)
    torch.testing.assert_close(dflash.text_states(drafter, given), drafter.fuse(drafter.join(given.hidden)))
    dflash.begin_step(drafter, settings, 3, 8)
    dflash.loss(drafter, given, settings, TARGET)[0].backward()
    assert drafter.fusion.weight.grad[:, width:].any()


def test_logits_of_new_layers_differ_little() -> None:
    """A head of large weights makes the final norm's scales smaller, in the target's proportions; no small one does."""
    for sharpness, is_scaled in ((0.5, False), (40.0, True)):
        target = Target(tiny_model("llama", sharpness=sharpness))
        drafter = dflash.build(PLAIN, target)
        ratios_D = drafter.norm.weight.detach() / target.model.model.norm.weight.detach()
        torch.testing.assert_close(ratios_D, ratios_D[:1].expand_as(ratios_D))
        assert (float(ratios_D[0]) < 0.9) == is_scaled
        normed_ND = torch.randn(200, target.hidden_size, generator=torch.Generator().manual_seed(1))
        spread = float(target.head((normed_ND * drafter.norm.weight)[None])[0].std(-1).mean().detach())
        assert 0.9 < spread < 1.1 if is_scaled else spread < 1, spread
        # The tokens that a shortlist leaves out have logits of minus infinity, which say nothing of the head.
        listed = dflash.build(trainer_settings(dflash, **SMALL, shortlist=32), target)
        torch.testing.assert_close(listed.norm.weight, drafter.norm.weight)


def test_default_layers() -> None:
    """From the second block's output to the fourth last's: 1 to L - 3, counted from 0."""
    assert dflash.default_layers(36, 5) == (2, 10, 18, 26, 34)
    assert dflash.default_layers(30, 3) == (2, 15, 28)
    assert dflash.default_layers(36, 1) == (19,)
    assert dflash.default_layers(3, 3) == (2,)
    assert dflash.default_layers(1, 3) == (1,)


def test_unused_token(tmp_path: Path) -> None:
    """The mask token; a token beyond the tokenizer's; a pad token; the last special token; the last token of all."""
    tiny_model("llama").save_pretrained(tmp_path)
    info = read_target_info(str(tmp_path))
    assert unused_token(info) == VOCAB_SIZE - 1
    tokenizer = tiny_tokenizer()
    for change, expected in (
        (lambda: None, VOCAB_SIZE - 1),
        (lambda: tokenizer.add_tokens(["w9", "w4"], special_tokens=True), 9),
        (lambda: setattr(tokenizer, "pad_token", "w5"), 5),
        (lambda: setattr(tokenizer, "eos_token", "w5"), 9),
        (lambda: setattr(tokenizer, "mask_token", "w7"), 7),
    ):
        change()
        assert unused_token(dataclasses.replace(info, tokenizer=tokenizer)) == expected
    assert unused_token(dataclasses.replace(info, tokenizer=tiny_tokenizer(60))) == 60


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": (3, 1)}, r"layers is \[3, 1\]; list hidden layers from 0 up in ascending order, none twice"),
        ({"layers": (1, 1)}, r"layers is \[1, 1\]; list hidden layers from 0 up in ascending order, none twice"),
        ({"num_heads": 4, "num_kv_heads": 3}, "num_kv_heads is 3; it must divide the number of attention heads, 4"),
    ],
    ids=["order", "twice", "key-value heads"],
)
def test_settings_that_fit_no_target(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": (1, 9)}, r"layers is \[1, 9\]; .* has hidden layers 0 to 3"),
        ({"mask_token": VOCAB_SIZE}, f"mask_token is {VOCAB_SIZE}; .* has {VOCAB_SIZE} tokens"),
        ({"num_heads": 5}, "num_heads is 5; twice that must divide the width 32"),
        ({"shortlist": VOCAB_SIZE + 1}, "shortlist is 65"),
    ],
    ids=["layers", "mask", "heads", "shortlist"],
)
def test_settings_that_do_not_fit_the_target(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        dflash.check(trainer_settings(dflash, **changes), read_target_info(str(tmp_path)))
