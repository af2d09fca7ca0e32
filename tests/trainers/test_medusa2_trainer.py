"""Medusa-2's trainer: losses against slow references, the loss weight's ramp, resuming, and two ranks.

Shape suffixes: B rows, T positions, K heads, V vocabulary.
"""

import math
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.func import functional_call

import draftsmith
from data.batches import Batch, collate, example
from data.teacher import complete
from draftsmith import Target
from draftsmith.artifacts.artifact import read_manifest
from draftsmith.parts.self_drafting.fine_tuned import linear_layers
from tests.support import runs
from tests.support.models import VOCAB_SIZE, tiny_model
from tests.support.runs import SMALL, command, logged, make_data, make_target, run, trainer_settings, weights
from trainers import medusa2
from trainers.training import checkpoints, gradient
from trainers.training.loop import train

TARGET = Target(tiny_model("llama"))
FACTORS = {"num_heads": 2, "rank": 3, "alpha": 2.0, "dropout": 0.0}
SETTINGS = trainer_settings(medusa2, **FACTORS)
"""Without dropout, whose masks would differ between two ranks and one process."""
LOSSES = ("loss", "target_loss", "head0_loss", "head1_loss", "grad_norm", "learning_rate", "eval_acceptance")


@pytest.fixture(autouse=True)
def frozen() -> None:
    """Freezes the target, as the training loop does."""
    TARGET.model.requires_grad_(False)


def settings_of(**changes: Any) -> medusa2.Settings:
    return trainer_settings(medusa2, **FACTORS | changes)


def batch(target: Target = TARGET) -> Batch:
    """Returns rows of 9, 12 and 15 tokens whose loss masks begin at different positions and have a gap."""
    generator, rows = torch.Generator().manual_seed(0), []
    for row in range(3):
        length = 9 + 3 * row
        mask = [position >= 2 + row and position != 7 for position in range(length)]
        rows.append(example(torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist(), mask, str(row)))
    return complete(collate(rows), target, (target.num_layers,))


def perturbed_drafter(settings: medusa2.Settings, target: Target = TARGET) -> medusa2.Drafter:
    """Returns a new drafter with nonzero weights."""
    torch.manual_seed(0)
    drafter, generator = medusa2.build(settings, target), torch.Generator().manual_seed(0)
    for weight in drafter.parameters():
        weight.data += 0.1 * torch.randn(weight.shape, generator=generator)
    return drafter


def slow_logits(drafter: medusa2.Drafter, given: Batch, *, is_fine_tuned: bool) -> tuple[Tensor, Tensor]:
    """Returns the target's [B, T, V] and the heads' logits [K, B, T, V] with the adapters merged into its weights.

    Without `is_fine_tuned` only its output head is changed.
    """
    model, scale = TARGET.model, drafter.config.alpha / drafter.config.rank
    changed = {
        f"{name}.weight": model.get_parameter(f"{name}.weight") + scale * adapter.up.weight @ adapter.down.weight
        for name, adapter in zip(linear_layers(TARGET), drafter.adapters, strict=True)
    }
    inner = {name.removeprefix("model."): weight for name, weight in changed.items() if name != "lm_head.weight"}
    normed_BTD = functional_call(model.model, inner if is_fine_tuned else {}, (given.tokens_BT,)).last_hidden_state
    heads = []
    for blocks in drafter.blocks:
        z_BTD = normed_BTD
        for linear in blocks:
            z_BTD = z_BTD + torch.nn.functional.silu(linear(z_BTD))
        heads.append(z_BTD @ changed["lm_head.weight"].T)
    return normed_BTD @ changed["lm_head.weight"].T, torch.stack(heads)


def supervised_positions(given: Batch, offset: int) -> list[tuple[int, int]]:
    """Returns (row, t) of all positions where the token at t + offset is supervised."""
    rows, length = given.tokens_BT.shape
    return [(b, t) for b in range(rows) for t in range(length - offset) if given.loss_mask_BT[b, t + offset]]


@pytest.mark.parametrize("num_logits", [2**24, 4 * VOCAB_SIZE])
@pytest.mark.parametrize(("method", "step"), [("self_distilled", 3), ("two_stage", 3), ("two_stage", 1)])
def test_loss_and_gradients_equal_a_slow_reference(
    method: str, step: int, num_logits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference goes token by token; values agree to float32's rounding, whole or in chunks."""
    monkeypatch.setattr(medusa2.sum_in_chunks, "__kwdefaults__", {"max_logits": num_logits})
    settings, given = settings_of(method=method, head_steps=2), batch()
    drafter = perturbed_drafter(settings)
    is_fine_tuned = step >= 2 or method == "self_distilled"
    own_BTV, heads_KBTV = slow_logits(drafter, given, is_fine_tuned=is_fine_tuned)
    heads_sum, own_sum = torch.zeros(()), torch.zeros(())
    for k in range(2):
        for b, t in supervised_positions(given, 2 + k):
            log_probs_V = heads_KBTV[k, b, t].log_softmax(-1)
            heads_sum = heads_sum - 0.8 ** (k + 1) * log_probs_V[given.tokens_BT[b, t + 2 + k]]
    for b, t in supervised_positions(given, 1):
        log_probs_V = own_BTV[b, t].log_softmax(-1)
        if method == "two_stage":
            own_sum = own_sum - log_probs_V[given.tokens_BT[b, t + 1]]
        else:
            theirs_V = TARGET.model(given.tokens_BT[b : b + 1]).logits[0, t].log_softmax(-1)
            own_sum = own_sum + (theirs_V.exp() * (theirs_V - log_probs_V)).sum()
    ramp = math.sin(math.pi / 2 * 4 / 10)
    slow = heads_sum if step == 1 else own_sum + (0.2 if method == "two_stage" else 0.01 * ramp) * heads_sum
    expected = torch.autograd.grad(slow, list(drafter.parameters()), allow_unused=True)
    medusa2.begin_step(drafter, settings, step, 10)
    fast, metrics = medusa2.loss(drafter, given, settings, TARGET)
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-5)
    found = torch.autograd.grad(fast, list(drafter.parameters()))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, torch.zeros_like(one) if other is None else other, rtol=1e-3, atol=1e-4)
    counts = [len(supervised_positions(given, offset)) for offset in ((2, 3) if step == 1 else (1, 2, 3))]
    assert [count for _, count in metrics.values()] == counts


def test_heads_weight_follows_a_sine() -> None:
    """After a third of training sin(30 degrees), after half sin(45), at the last step the whole weight."""
    given = batch()
    for steps, weight, expected in (
        ((0, 3), 0.0, 0.005),
        ((3, 8), 0.0, 0.00707107),
        ((7, 8), 0.0, 0.01),
        ((7, 8), 3, 3),
    ):
        settings = settings_of(heads_weight=weight)
        drafter = perturbed_drafter(settings)
        medusa2.begin_step(drafter, settings, *steps)
        total, metrics = medusa2.loss(drafter, given, settings, TARGET)
        heads = 0.8 * metrics["head0_loss"][0] + 0.64 * metrics["head1_loss"][0]
        torch.testing.assert_close(total, metrics["target_loss"][0] + expected * heads)


def test_new_adapters_leave_the_target_unchanged() -> None:
    """One factor is random and the other zero, so that the loss is that of the heads alone."""
    settings, given = settings_of(), batch()
    drafter = medusa2.build(settings, TARGET)
    assert all(adapter.down.weight.any() and not adapter.up.weight.any() for adapter in drafter.adapters)
    medusa2.begin_step(drafter, settings, 8, 8)
    _, metrics = medusa2.loss(drafter, given, settings, TARGET)
    assert metrics["target_loss"][0].abs() < 1e-4


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_merged_weights_equal_those_of_peft(architecture: str) -> None:
    """Weights agree to 1e-6, and the target in training, with unmerged adapters, gives the same logits."""
    target = Target(tiny_model(architecture))
    drafter = perturbed_drafter(settings_of(), target)
    names = list(linear_layers(target))
    model = get_peft_model(
        tiny_model(architecture),
        LoraConfig(r=3, lora_alpha=2, target_modules=names, fan_in_fan_out=architecture == "gpt2"),
    )
    for name, adapter in zip(names, drafter.adapters, strict=True):
        layer = model.base_model.model.get_submodule(name)
        layer.lora_A["default"].weight.data.copy_(adapter.down.weight)
        layer.lora_B["default"].weight.data.copy_(adapter.up.weight)
    merged = model.merge_and_unload(safe_merge=True)
    for name, weight in drafter.merged_weights().items():
        torch.testing.assert_close(weight, merged.get_parameter(name), rtol=0, atol=1e-6)
        assert not torch.equal(weight, target.model.get_parameter(name))
    ids = batch(target).tokens_BT
    with torch.no_grad():
        torch.testing.assert_close(drafter.target.model(ids).logits, merged.eval()(ids).logits, rtol=1e-4, atol=1e-4)


def test_dropout_applies_in_training_only_and_not_at_the_head() -> None:
    drafter, given = perturbed_drafter(settings_of(dropout=0.5)), batch()

    def read() -> Tensor:
        last = TARGET.num_layers
        return drafter.target.read(given.tokens_BT, (last,))[last]

    drafter.train()
    assert not torch.equal(read(), read())
    assert not drafter.target.model.training
    head = drafter.adapters[-1]
    assert head.up.weight.shape[0] == VOCAB_SIZE and head.dropout.p == 0  # type: ignore[union-attr]
    drafter.eval()
    assert torch.equal(read(), read())


def test_evaluate_equals_metrics_by_hand() -> None:
    """Heads are compared with the fine-tuned target's greedy tokens, and those with the text."""
    settings, given = settings_of(), batch()
    drafter = perturbed_drafter(settings)
    with torch.no_grad():
        own_BTV, heads_KBTV = slow_logits(drafter, given, is_fine_tuned=True)
        greedy_BT, predicted_KBT = own_BTV.argmax(-1), heads_KBTV.argmax(-1)
        hits = [
            {
                (b, t): bool(predicted_KBT[k, b, t] == greedy_BT[b, t + 1 + k])
                for b, t in supervised_positions(given, 2 + k)
            }
            for k in (0, 1)
        ]
        whole = [spot for spot in hits[0] if spot in hits[1]]
        metrics = medusa2.evaluate(drafter, given, settings, TARGET)
    runs = [hits[0][spot] + (hits[0][spot] and hits[1][spot]) for spot in whole]
    assert [int(part) for part in metrics["acceptance"]] == [sum(runs), len(whole)]
    for k in range(2):
        assert [int(part) for part in metrics[f"head{k}_accuracy"]] == [sum(hits[k].values()), len(hits[k])]
    num_correct = sum(bool(greedy_BT[b, t] == given.tokens_BT[b, t + 1]) for b, t in supervised_positions(given, 1))
    assert [int(part) for part in metrics["target_accuracy"]] == [num_correct, len(supervised_positions(given, 1))]
    assert sum(runs) > 0


def test_learning_rate_factors_by_hand() -> None:
    heads, changes = medusa2.learning_rate_factors(settings_of()).values()
    assert [heads(step) for step in (0, 99)] == [4, 4] and [changes(step) for step in (0, 99)] == [1, 1]
    heads, changes = medusa2.learning_rate_factors(
        settings_of(method="two_stage", head_steps=10, head_rate=2.0)
    ).values()
    assert heads(5) == 2 and [changes(step) for step in (9, 10, 59, 109, 500)] == [0, 0.01, 0.5, 1, 1]


# --- In the loop -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("runs")
    make_data(make_target(root / "target"), root / "data")
    return root


@pytest.fixture(scope="module")
def unbroken(folder: Path) -> Path:
    return train(medusa2, settings_of(dropout=0.1, tree_nodes=4), run_settings(folder, "unbroken"))


run_settings = partial(runs.run_settings, **SMALL | {"learning_rate": 0.01})


def test_a_run_keeps_the_target_and_saves_a_fine_tuned_one(folder: Path, unbroken: Path) -> None:
    target = Target.from_pretrained(str(folder / "target"), dtype="float32")
    fingerprint, before = target.fingerprint, {n: w.clone() for n, w in target.model.state_dict().items()}
    drafter = draftsmith.load(unbroken, target)
    assert len(drafter.config.tree) == 4 and drafter.target is not target
    after = target.model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(after[name], weight) for name, weight in before.items())
    assert all((adapter.delta() != 0).any() for adapter in drafter.adapters)
    ids = torch.tensor([[5, 6, 7, 8]])
    out = draftsmith.generate(drafter.target, ids, drafter, max_new_tokens=12)
    expected = drafter.target.model.generate(
        ids, do_sample=False, max_new_tokens=12, attention_mask=torch.ones_like(ids)
    )
    assert torch.equal(out.sequences, expected)
    assert read_manifest(unbroken)["target"]["fingerprint"] == fingerprint


def test_parameter_groups_have_their_own_learning_rates(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[tuple[int, float]]] = []

    class Rates(gradient.CheckpointSchedule):
        def on_pre_optimizer_step(self, *_: Any, optimizer: Any = None, **__: Any) -> None:
            seen.append([(len(group["params"]), group["lr"]) for group in optimizer.param_groups])

    monkeypatch.setattr(gradient, "CheckpointSchedule", Rates)
    train(medusa2, settings_of(tree_nodes=1), run_settings(folder, "rates", schedule="constant", max_steps=4))
    # Heads have two matrices and, in a group without weight decay, two biases; 22 adapters have two factors each.
    assert [size for size, _ in seen[0]] == [2, 44, 2]
    heads, changes, biases = zip(*[[rate for _, rate in groups] for groups in seen], strict=True)
    assert heads == biases == tuple(4 * rate for rate in changes)
    assert changes == (0.0, 0.005, 0.01, 0.01)


def test_an_interrupted_run_ends_with_the_same_bytes(
    folder: Path, unbroken: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is stopped after the checkpoint at step 4 and continues loss weight, learning rates and dropout."""

    again, mark_complete = run_settings(folder, "broken"), checkpoints.mark_complete

    def stop_at_the_end(checkpoint: Path, facts: dict[str, Any]) -> None:
        if checkpoint.name.endswith("-8"):
            raise KeyboardInterrupt
        mark_complete(checkpoint, facts)

    monkeypatch.setattr(checkpoints, "mark_complete", stop_at_the_end)
    with pytest.raises(KeyboardInterrupt):
        train(medusa2, settings_of(dropout=0.1, tree_nodes=4), again)
    monkeypatch.undo()
    train(medusa2, settings_of(dropout=0.1, tree_nodes=4), again)
    assert logged(folder / "broken", *LOSSES) == logged(unbroken, *LOSSES)
    for name, weight in weights(unbroken).items():
        assert torch.equal(weights(folder / "broken")[name], weight), name


@pytest.mark.slow
@pytest.mark.parametrize("method", ["self_distilled", "two_stage"])
def test_two_ranks_equal_one_process(folder: Path, method: str) -> None:
    """Losses agree to 1e-4 and weights to 1e-5; the divergence of almost equal distributions is rounding.

    One of the two stages does not use half of the weights.
    """
    flags = {**SMALL, **FACTORS, "method": method, "head_steps": 3, "clip": 0, "tree_nodes": 2, "learning_rate": 1e-3}
    launcher = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2")
    for name, words, batch_size in (("one", (), 4), ("two", launcher, 2)):
        paths = {"target": "target", "data": "data", "output": f"{method}-{name}"}
        done = run(command("medusa2", *words, **{**flags, **paths, "batch_size": batch_size}), folder)
        assert done.returncode == 0, done.stdout + done.stderr
    one, two = folder / f"{method}-one", folder / f"{method}-two"
    for ours, theirs in zip(logged(two, *LOSSES), logged(one, *LOSSES), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-7)
    for name, weight in weights(one).items():
        torch.testing.assert_close(weights(two)[name], weight, rtol=0, atol=1e-5)


def test_invalid_settings_raise() -> None:
    for changes in (
        {"num_heads": 0},
        {"rank": 0},
        {"alpha": 0.0},
        {"head_rate": -1.0},
        {"head_steps": -1},
        {"dropout": 1.0},
    ):
        with pytest.raises(ValueError, match=next(iter(changes))):
            settings_of(**changes)
    with pytest.raises(ValueError, match="no linear layer called c_attn"):
        medusa2.build(settings_of(modules=("c_attn",)), TARGET)


def test_two_stages_need_more_steps_than_the_first_has() -> None:
    assert medusa2.first_steps(settings_of(method="two_stage", head_steps=7)) == ("head_steps", 7)
    assert medusa2.first_steps(settings_of(method="self_distilled", head_steps=7)) == ("head_steps", 0)
