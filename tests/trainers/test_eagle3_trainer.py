"""EAGLE-3's trainer: its loss against drafts run one by one, metrics by hand, and the draft vocabulary.

Shape suffixes: B rows, T positions, D hidden width, V vocabulary.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import draftsmith
from data.batches import Batch, collate, example
from data.examples import open_examples
from data.teacher import complete
from data.teacher_store import TeacherStoreSettings, write_teacher_store
from tests.support.family import texts
from tests.support.models import VOCAB_SIZE, greedy_by_transformers, prompts, scramble, tiny_target
from tests.support.runs import SMALL, logged, make_data, make_target, trainer_settings, weights
from tests.trainers.training.test_distributed import TORCHRUN, check_same, launch
from trainers import eagle3
from trainers.eagle3 import Drafter, Settings
from trainers.parts.fused import linear_cross_entropy
from trainers.parts.recursive.drafts import list_drafts
from trainers.training import checkpoints
from trainers.training.loop import train
from trainers.training.run_settings import RunSettings

TARGET = tiny_target("llama")
SETTINGS = trainer_settings(eagle3, num_kv_heads=2, num_steps=3, draft_vocab=40)


def batch(num_rows: int = 3) -> Batch:
    """Returns rows of 5, 7 and 9 tokens whose loss masks begin at different positions and have a gap."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for row in range(num_rows):
        length = 5 + 2 * row
        mask = [position >= 1 + row and position != 4 for position in range(length)]
        rows.append(example(torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist(), mask, str(row)))
    return complete(collate(rows), TARGET, eagle3.needs(SETTINGS, TARGET).layers)


def perturbed_drafter(settings: Settings = SETTINGS) -> Drafter:
    """Returns a layer with random weights and a vocabulary with gaps."""
    drafter = eagle3.build(settings, TARGET)
    scramble(drafter, seed=1)
    drafter.set_vocabulary(torch.arange(len(drafter.d2t)) * VOCAB_SIZE // len(drafter.d2t))
    return drafter


def chain_from(drafter: Drafter, given: Batch, row: int, start: int) -> Iterator[Tensor]:
    """Yields three steps' logits [V] of the draft that begins at position `start`, run by itself, as in drafting.

    Each step runs the layer's plain causal attention over all positions again: on the target's features up to `start`,
    then on the layer's own.
    """
    tokens_T = given.tokens_BT[row, : given.lengths_B[row]]
    hidden = {layer: states[row : row + 1, : start + 1] for layer, states in given.hidden.items()}
    features_BTD = drafter.fuse(drafter.join(hidden))
    for step in range(min(3, len(tokens_T) - 2 - start)):
        order = torch.arange(start + 1 + step)[None]
        read_BT = tokens_T[None, 1 : start + 2 + step]
        new_BTD, normed_BTD = drafter(read_BT, features_BTD, lambda x_BTE, order=order: drafter.attention(x_BTE, order))
        features_BTD = torch.cat([features_BTD, new_BTD[:, -1:]], dim=1)
        yield drafter.logits(normed_BTD)[0, -1]


@pytest.mark.parametrize("changes", [{}, {"fusion_norm": "each", "norm_output": True}, {"draft_vocab": 0}])
def test_loss_and_gradients_equal_drafts_run_one_by_one(changes: dict[str, Any]) -> None:
    """Values agree to float32's rounding."""
    settings, given = (
        trainer_settings(eagle3, **{"num_kv_heads": 2, "num_steps": 3, "draft_vocab": 40} | changes),
        batch(),
    )
    drafter = perturbed_drafter(settings)
    ids_W, slow, counts = drafter.vocabulary(), torch.zeros(()), [0, 0, 0]
    theirs_BTV = TARGET.logits(given.hidden[TARGET.num_layers]).detach()
    for row, length in enumerate(given.lengths_B.tolist()):
        for start in range(length - 2):
            for step, logits_V in enumerate(chain_from(drafter, given, row, start)):
                theirs_V = theirs_BTV[row, start + 1 + step]
                if not given.loss_mask_BT[row, start + 2 + step] or int(theirs_V.argmax()) not in ids_W:
                    continue
                counts[step] += 1
                slow = slow - 0.8**step * (theirs_V[ids_W].softmax(0) * logits_V[ids_W].log_softmax(0)).sum()
    expected = torch.autograd.grad(slow, list(drafter.parameters()))
    fast, metrics = eagle3.loss(drafter, given, settings, TARGET)
    torch.testing.assert_close(fast, slow)
    found = torch.autograd.grad(fast, list(drafter.parameters()))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert [count for _, count in metrics.values()] == counts
    assert min(counts) > 0 and (not changes.get("draft_vocab", 40) or sum(counts) < 3 * sum(given.loss_mask_BT.sum(1)))


def test_drafts_without_a_supervised_step_are_not_run() -> None:
    """Three steps from position t are supervised at t + 2 to t + 4; the prompt's keys are read, its drafts are not."""
    masks = [[position >= 20 for position in range(24)], [position == 9 for position in range(15)]]
    rows = [example(list(range(3, 3 + len(mask))), mask, str(row)) for row, mask in enumerate(masks)]
    given = complete(collate(rows), TARGET, eagle3.needs(SETTINGS, TARGET).layers)
    drafts = list_drafts(given, 3)
    assert drafts.starts_X.tolist() == [16, 17, 18, 19, 20, 21, 5, 6, 7]
    assert drafts.rows_X.tolist() == [0] * 6 + [1] * 3 and drafts.order_X.tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2]
    assert drafts.index(drafts.rows_X, drafts.starts_X).tolist() == list(range(9))
    drafter, widths = perturbed_drafter(), []
    drafter.feed_forward.register_forward_hook(lambda _, inputs, output: widths.append(tuple(inputs[0].shape[:2])))
    eagle3.loss(drafter, given, SETTINGS, TARGET)
    assert widths == [(1, 9)] * 3


def test_a_row_whose_answer_begins_too_early_adds_nothing() -> None:
    """Token 1 is predicted from the text's first feature, before any draft."""
    given = complete(
        collate([example([5, 6, 7], [False, True, False], "row")]), TARGET, eagle3.needs(SETTINGS, TARGET).layers
    )
    loss, metrics = eagle3.loss(perturbed_drafter(), given, SETTINGS, TARGET)
    assert loss.item() == 0 and [count for _, count in metrics.values()] == [0, 0, 0]


def test_chunks_do_not_change_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    given, drafter = batch(), perturbed_drafter()
    whole, _ = eagle3.loss(drafter, given, SETTINGS, TARGET)
    expected = torch.autograd.grad(whole, list(drafter.parameters()))
    monkeypatch.setattr(eagle3, "MAX_LOGITS", 400)
    monkeypatch.setattr(linear_cross_entropy, "MAX_ROWS", 7)
    monkeypatch.setattr(linear_cross_entropy, "BLOCK_LOGITS", {"cpu": 100})
    parts, _ = eagle3.loss(drafter, given, SETTINGS, TARGET)
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(torch.autograd.grad(parts, list(drafter.parameters())), expected, rtol=1e-4, atol=1e-5)


def test_four_steps_have_golden_losses() -> None:
    """Losses of four AdamW steps equal recorded values to 1e-4, for float32 on other machines."""
    torch.manual_seed(0)
    given, drafter = batch(), eagle3.build(SETTINGS, TARGET)
    optimizer = torch.optim.AdamW(drafter.parameters(), lr=1e-2)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss, _ = eagle3.loss(drafter, given, SETTINGS, TARGET)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == pytest.approx([93.69119, 64.64311, 54.4956, 52.1015], rel=1e-4)


@torch.no_grad()
def test_evaluate_equals_metrics_by_hand() -> None:
    """Acceptance counts correct steps before the first wrong one, at positions where all steps are supervised."""
    drafter, given = perturbed_drafter(), batch()
    hits: list[dict[tuple[int, int], bool]] = [{}, {}, {}]
    for row, length in enumerate(given.lengths_B.tolist()):
        # The text contains a draft from its middle, so that some steps are correct.
        start = length // 2 - 1
        for step in range(min(3, length - 2 - start)):
            logits_V = list(chain_from(drafter, given, row, start))[step]
            given.tokens_BT[row, start + 2 + step] = logits_V.argmax()
    for row, length in enumerate(given.lengths_B.tolist()):
        for start in range(length - 2):
            for step, logits_V in enumerate(chain_from(drafter, given, row, start)):
                if given.loss_mask_BT[row, start + 2 + step]:
                    hits[step][row, start] = int(logits_V.argmax()) == int(given.tokens_BT[row, start + 2 + step])
    whole = [spot for spot in hits[0] if spot in hits[1] and spot in hits[2]]
    runs = [next((step for step in range(3) if not hits[step][spot]), 3) for spot in whole]
    metrics = eagle3.evaluate(drafter, given, SETTINGS, TARGET)
    assert [int(part) for part in metrics.pop("acceptance")] == [sum(runs), len(whole)]
    assert [(int(right), count) for right, count in metrics.values()] == [(sum(hit.values()), len(hit)) for hit in hits]
    assert sum(runs) > 0


def test_prepare_takes_the_most_frequent_supervised_tokens() -> None:
    """Unsupervised tokens do not count; ties go to lower ids."""
    settings = trainer_settings(eagle3, draft_vocab=4)
    rows = [
        example([7, 7, 7, 7, 9, 9], [False] * 4 + [True] * 2, "a"),
        example([60, 60, 60, 9, 12, 11], None, "b"),
        example([11, 13], [False, True], "c"),
    ]
    drafter = eagle3.build(settings, TARGET)
    assert drafter.vocabulary().tolist() == [0, 1, 2, 3]
    eagle3.prepare(drafter, settings, TARGET, rows)
    assert drafter.vocabulary().tolist() == [9, 11, 12, 60]
    head = TARGET.model.get_output_embeddings().weight
    assert torch.equal(drafter.head.weight, head[[9, 11, 12, 60]])
    everything = eagle3.build(eagle3.Settings(), TARGET)
    eagle3.prepare(everything, eagle3.Settings(), TARGET, rows)
    assert everything.vocabulary().tolist() == list(range(VOCAB_SIZE)) and torch.equal(everything.head.weight, head)


def test_default_and_given_fused_layers() -> None:
    assert eagle3.default_layers(32) == (2, 16, 29)
    assert eagle3.default_layers(8) == (2, 4, 5)
    assert [eagle3.default_layers(few) for few in (1, 2, 3, 6)] == [(1,), (1, 2), (1, 2, 3), (1, 3, 6)]
    assert eagle3.needs(trainer_settings(eagle3, layers=(0, 2)), TARGET).layers == (0, 2, 3)
    assert eagle3.build(trainer_settings(eagle3, layers=(0, 2)), TARGET).config.layers == (0, 2)


def test_an_overfitted_layer_has_all_drafts_accepted() -> None:
    """It is trained on the target's greedy text alone and drafts it from prompts of two lengths."""
    text = greedy_by_transformers("llama", 1, 20)[0]
    mask = [False] * len(prompts(1)[0]) + [True] * 20
    settings = trainer_settings(eagle3, num_steps=3, num_draft=3, width=0)
    given = complete(collate([example(text, mask, "text")]), TARGET, eagle3.needs(settings, TARGET).layers)
    torch.manual_seed(0)
    drafter = eagle3.build(settings, TARGET)
    optimizer = torch.optim.AdamW(drafter.parameters(), lr=5e-3)
    # The learning rate falls to 0, since the layer is far from what it learnt for some steps after each large one.
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=200)
    for _ in range(200):
        optimizer.zero_grad()
        loss, _ = eagle3.loss(drafter, given, settings, TARGET)
        loss.backward()
        optimizer.step()
        schedule.step()
    right, count = eagle3.evaluate(drafter, given, settings, TARGET)["acceptance"]
    assert int(right) == 3 * count
    for length in (len(prompts(1)[0]), 12):
        out = draftsmith.generate(TARGET, torch.tensor([text[:length]]), drafter.eval(), max_new_tokens=13)
        assert texts(out) == [text[: length + 13]]
        assert out.stats.accepted_per_depth == [1, 1, 1]


def run_settings(folder: Path, name: str, data: str, **changes: Any) -> RunSettings:
    paths = {"target": str(folder / "target"), "data": str(folder / data), "output": str(folder / name)}
    return RunSettings(**paths | SMALL | changes)


def test_runs_with_a_draft_vocabulary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The teacher store gives the live target's losses up to bf16 rounding, and a resumed run the unbroken run's."""
    target = make_target(tmp_path / "target")
    make_data(target, tmp_path / "data")
    layers = eagle3.needs(SETTINGS, target).layers
    rows = open_examples(str(tmp_path / "data"), target)
    write_teacher_store(
        target, [rows[at] for at in range(len(rows))], tmp_path / "store", TeacherStoreSettings(layers=layers)
    )
    live, stored = (
        train(eagle3, SETTINGS, run_settings(tmp_path, name, data))
        for name, data in (("live", "data"), ("kept", "store"))
    )
    for one, other in zip(logged(live, "loss"), logged(stored, "loss"), strict=True):
        assert one == pytest.approx(other, rel=5e-2)  # the store rounds hidden states, and steps add to it
    assert torch.equal(weights(live)["d2t"], weights(stored)["d2t"]) and weights(live)["d2t"].any()

    mark_complete = checkpoints.mark_complete

    def stop_at_the_end(checkpoint: Path, facts: dict[str, Any]) -> None:
        if checkpoint.name == "checkpoint-8":
            raise KeyboardInterrupt
        mark_complete(checkpoint, facts)

    monkeypatch.setattr(checkpoints, "mark_complete", stop_at_the_end)
    with pytest.raises(KeyboardInterrupt):
        train(eagle3, SETTINGS, run_settings(tmp_path, "broken", "data"))
    monkeypatch.undo()
    broken = train(eagle3, SETTINGS, run_settings(tmp_path, "broken", "data"))
    for name, weight in weights(live).items():
        assert torch.equal(weights(broken)[name], weight), name
    train(eagle3, SETTINGS, run_settings(tmp_path, "half", "data", bf16=True, max_steps=2))


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["", "zero3"])
def test_two_ranks_equal_one_process(tmp_path: Path, stage: str) -> None:
    """Each rank counts the vocabulary itself and calls the layer's modules separately."""
    make_data(make_target(tmp_path / "target"), tmp_path / "data")
    given = {"recipe": "eagle3", "num_steps": 3, "draft_vocab": 40}
    one = launch(tmp_path, "one", batch_size=4, **given)
    two = launch(tmp_path, "two", *TORCHRUN, batch_size=2, **given | ({"deepspeed": stage} if stage else {}))
    check_same(two, one)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 0}, "num_heads is 0"),
        ({"num_steps": 0}, "num_steps is 0"),
        ({"draft_vocab": -1}, "draft_vocab is -1"),
        ({"decay": 0.0}, "decay is 0.0"),
        ({"length": "long"}, "unknown length policy"),
        ({"layers": (1, 4)}, "has 3"),
        ({"draft_vocab": 65}, "has 64 tokens"),
        ({"num_heads": 3}, "num_heads is 3"),
    ],
)
def test_invalid_settings_raise(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        eagle3.check(trainer_settings(eagle3, **changes), TARGET)
