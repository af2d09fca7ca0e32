"""The MTP trainer: its steps against plain forwards, its weights by hand, and heads of checkpoints trained on.

Shape suffixes: B rows, T positions, S steps, D hidden width, V vocabulary.
"""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import draftsmith
from data.batches import Batch, collate, example
from data.pseudo_data import read_pseudo_data
from data.teacher import complete
from draftsmith import Target
from draftsmith.core.tree import Tree
from tests.drafters.test_mtp import naive_steps, reference_rounds
from tests.export.test_export_acceptance import accepted_here
from tests.support.families.mtp_targets import CONFIGS, write_target
from tests.support.models import VOCAB_SIZE, scramble, tiny_target
from tests.support.runs import SMALL, command, logged, make_data, make_target, run, run_settings, trainer_settings
from trainers import import_mtp, mtp
from trainers.mtp import Drafter, Settings
from trainers.training.loop import train

SETTINGS = trainer_settings(mtp, num_draft=3)


def batch(target: Target, num_rows: int = 3) -> Batch:
    """Returns rows of 6, 9 and 12 tokens whose loss masks begin at different positions and have a gap."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for row in range(num_rows):
        length = 6 + 3 * row
        mask = [position >= 1 + row and position != 5 for position in range(length)]
        rows.append(example(torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist(), mask, str(row)))
    return complete(collate(rows), target, (target.num_layers,))


def perturbed(settings: Settings, target: Target) -> Drafter:
    drafter = mtp.build(settings, target)
    scramble(drafter, seed=1)
    shortlist = drafter.shared_head.shortlist
    if not shortlist.is_whole:
        shortlist.set_tokens(torch.arange(len(shortlist)) * VOCAB_SIZE // len(shortlist))
    return drafter


@pytest.mark.parametrize("architecture", ["llama", "mistral"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"shortlist": 40}, {"loss": "forward_kl", "num_steps": 2}, {"num_heads": 2}, {"num_heads": 3}],
    ids=str,
)
def test_loss_and_gradients_equal_drafts_run_one_by_one(architecture: str, changes: dict[str, Any]) -> None:
    """Each draft reads the text's tokens; values agree to float32's rounding. Rows outgrow Mistral's window."""
    check_loss(tiny_target(architecture), trainer_settings(mtp, **changes))


@pytest.mark.parametrize("architecture", ["mimo_v2_flash", "mimo"])
def test_loss_of_heads_that_read_otherwise_equals_drafts_run_one_by_one(tmp_path: Path, architecture: str) -> None:
    """Heads after the first read the target's hidden states, or the first reads them before the norm."""
    write_target(tmp_path, architecture)
    target = Target.from_pretrained(str(tmp_path))
    settings = trainer_settings(mtp, num_heads=2)
    config = mtp.build(settings, target).config
    assert (config.is_chained, config.reads_normed) == (architecture == "mimo", architecture != "mimo")
    assert config.zeroes_first == (architecture == "mimo")
    check_loss(target, settings)


def check_loss(target: Target, settings: Settings) -> None:
    """Asserts that loss and gradients are those of drafts run one by one."""
    given = batch(target)
    drafter = perturbed(settings, target)
    head, shortlist = target.model.get_output_embeddings(), drafter.shared_head.shortlist
    listed = shortlist.rows(torch.arange(VOCAB_SIZE)).tolist()
    step_weights = {2: [1 / 1.6, 0.6 / 1.6], 3: [1 / 1.96, 0.6 / 1.96, 0.36 / 1.96]}[settings.num_steps]
    slow, counts = torch.zeros(()), [0] * settings.num_steps
    for row, length in enumerate(given.lengths_B.tolist()):
        ids, mask_T = given.tokens_BT[row].tolist(), given.loss_mask_BT[row]
        states_TD = given.hidden[target.num_layers][row]
        for start in range(length - 2):
            outputs_SD = naive_steps(drafter, ids[: start + 2], settings.num_steps, later=[*ids[start + 2 :], 0, 0, 0])
            for step, output_D in enumerate(outputs_SD):
                at = start + 2 + step
                if at >= length or not mask_T[at] or (settings.loss == "ce" and ids[at] not in listed):
                    continue
                logp = head(output_D)[listed].log_softmax(-1)
                if settings.loss == "ce":
                    value = -logp[listed.index(ids[at])]
                else:
                    theirs = target.logits(states_TD[at - 1][None, None])[0, 0].log_softmax(-1)
                    value = (theirs.exp() * (theirs - logp)).sum()
                slow = slow + step_weights[step] * value
                counts[step] += 1
    fast, metrics = mtp.loss(drafter, given, settings, target)
    torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-5)
    assert [count for _, count in metrics.values()] == counts and min(counts) > 0
    weights = [weight for weight in drafter.parameters() if weight.requires_grad]
    expected, found = (torch.autograd.grad(one, weights) for one in (slow, fast))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_weights_are_those_of_fast_mtp() -> None:
    assert [round(weight, 2) for weight in mtp.step_weights(Settings())] == [0.51, 0.31, 0.18]
    assert mtp.step_weights(trainer_settings(mtp, num_steps=2, decay=1.0)) == [0.5, 0.5]
    for changes, message in (
        ({"decay": 0.0}, "decay is 0.0"),
        ({"num_steps": 0}, "num_steps is 0"),
        ({"num_heads": 4}, "num_steps is 3; each of the 4 heads"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer_settings(mtp, **changes)


def test_drafts_of_a_batch_are_one_tree() -> None:
    starts_BM = torch.tensor([[1, 3], [0, 2]])
    tree = mtp.draft_tree(starts_BM, 4, 2)
    for row, (first, second) in enumerate(starts_BM.tolist()):
        expected = Tree.from_parents([[-1, 0, 1, 2, first, second, 4, 5]])
        assert tree.parents_RN[row].tolist() == expected.parents_RN[0].tolist()
        assert tree.depths_RN[row].tolist() == expected.depths_RN[0].tolist()
        assert torch.equal(tree.ancestors_RNN[row], expected.ancestors_RNN[0])


@pytest.mark.slow
def test_stage_three_of_deepspeed_is_refused(tmp_path: Path) -> None:
    make_data(make_target(tmp_path / "target"), tmp_path / "data")
    launcher = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2")
    given = SMALL | {"batch_size": 2, "target": "target", "data": "data", "output": "out", "deepspeed": "zero3"}
    done = run(command("mtp", *launcher, **given), tmp_path)
    assert done.returncode and "mtp.py: an MTP head cannot be trained in DeepSpeed's stage 3" in done.stderr


@pytest.mark.parametrize(
    "architecture",
    ["deepseek_v3", *(pytest.param(one, marks=pytest.mark.slow) for one in CONFIGS if one != "deepseek_v3")],
)
def test_head_of_a_checkpoint_is_trained_on(tmp_path: Path, architecture: str) -> None:
    """From the imported artifact: the loss falls, and each round accepts as many tokens as in the plain loop."""
    write_target(tmp_path / "target", architecture)
    target = Target.from_pretrained(str(tmp_path / "target"))
    make_data(target, tmp_path / "data", temperature="0", num_rows=12)
    given = SMALL | {"max_steps": 60, "eval_steps": 60, "save_steps": 60, "learning_rate": 1e-2}
    head = train(import_mtp, import_mtp.Settings(), run_settings(tmp_path, "imported"))
    output = train(mtp, SETTINGS, run_settings(tmp_path, "trained", start_from=str(head), **given))
    losses = [line["loss"] for line in logged(output, "loss") if "loss" in line]
    assert losses[-1] < 0.3 * losses[0]
    drafter, rows, expected = draftsmith.load(output, target), [], []
    for one in list(read_pseudo_data(tmp_path / "data"))[:4]:
        prompt, text = one.tokens_T[~one.loss_mask_T].tolist(), one.tokens_T[one.loss_mask_T].tolist()
        rows.append(prompt)
        expected.append(reference_rounds(drafter, prompt, text))
    assert accepted_here(drafter, rows, num_new=16) == expected
    accepted = [number for rounds in expected for number in rounds]
    assert sum(accepted) > len(accepted) / 4, "too little is accepted for a comparison"
