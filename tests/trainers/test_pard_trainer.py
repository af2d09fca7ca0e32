"""PARD's trainer: its loss against chains run one by one, the masks that it draws, and what it continues.

Shape suffixes: B rows, T positions, M masks, K drafted tokens, V vocabulary.
"""

import math
from pathlib import Path

import pytest
import torch

import draftsmith
from data.batches import Batch, collate, example
from data.teacher import complete
from draftsmith import Target
from draftsmith.drafters import lm, lookup
from draftsmith.loading.model_info import read_target_info
from tests.drafters.test_lm import small as small_lm
from tests.support.family import built
from tests.support.models import VOCAB_SIZE, scramble, tiny_model, tiny_target
from tests.support.runs import make_target, trainer_settings
from trainers import pard
from trainers.pard import Drafter, Settings
from trainers.parts import on_policy

TARGET = tiny_target("llama")
PLAIN = trainer_settings(pard, num_draft=4, num_anchors=4)
SETTINGS = trainer_settings(pard, num_draft=4, num_anchors=4, features=(0, 2), feature_dropout=0.5, loss="pard2")
"""Those of tests/trainers/test_every_trainer.py."""


def batch(num_rows: int = 2) -> Batch:
    """Returns rows of 6, 9, ... tokens whose loss masks begin at different positions and have a gap."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for row in range(num_rows):
        length = 6 + 3 * row
        mask = [position >= 1 + row and position != 5 for position in range(length)]
        rows.append(example(torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist(), mask, str(row)))
    return complete(collate(rows), TARGET, tuple(range(TARGET.num_layers + 1)))


def perturbed(settings: Settings = PLAIN) -> Drafter:
    drafter = pard.build(settings, TARGET)
    scramble(drafter, seed=1)
    pard.begin_step(drafter, settings, 0, 1)
    return drafter


@pytest.mark.parametrize("shortlist", [0, 20])
@pytest.mark.parametrize(
    ("loss", "features"), [("ce", ()), ("forward_kl", ()), ("ce", (1,)), ("pard2", ()), ("pard2", (0, 2))]
)
def test_loss_and_gradients_equal_chains_run_one_by_one(
    loss: str, features: tuple[int, ...], shortlist: int, tmp_path: Path
) -> None:
    """Values agree to float32's rounding."""
    draft_lm = built(lm, small_lm(TARGET, shortlist=shortlist), TARGET)
    draftsmith.save(draft_lm, tmp_path / "lm", TARGET)
    parts = (str(tmp_path / "lm"),)
    settings = trainer_settings(pard, parts=parts, num_draft=4, loss=loss, features=features, feature_dropout=0.5)
    given, drafter = batch(), perturbed(settings)
    without = on_policy.select_rows(0.5, given, "0:features")
    assert len(without) == 1, "one row of the two is to be without features"
    ids_W = drafter.shortlist.ids_W if shortlist else torch.arange(VOCAB_SIZE)
    embed = drafter.model.get_input_embeddings()
    masks = pard.draw_masks(given, settings, 4, "0")
    slow, num_by_depth = torch.zeros(()), [0] * 4
    for row, length in enumerate(given.lengths_B.tolist()):
        tokens_T, mask_T = given.tokens_BT[row], given.loss_mask_BT[row]
        theirs_TV = TARGET.logits(given.hidden[TARGET.num_layers][row : row + 1])[0].detach()
        added_TD = torch.zeros(length, drafter.draft_model.hidden_size)
        if features and row not in without:
            joined_TE = torch.cat([given.hidden[layer][row, : length - 1] for layer in features], dim=-1)
            added_TD = torch.cat([added_TD[:1], 0.02 * joined_TE @ drafter.projection.weight.T])
        pairs = [(at, 0) for at in range(length)]
        used = masks.is_used_BM[row].tolist()
        drawn = zip(masks.anchors_BM[row].tolist(), masks.depths_BM[row].tolist(), used, strict=True)
        pairs += [(anchor, depth) for anchor, depth, is_used in drawn if is_used]
        losses, weights = [], []
        for anchor, depth in pairs:
            label = anchor + depth + 1
            if label >= length or not mask_T[label]:
                continue
            read = torch.tensor([*tokens_T[: anchor + 1].tolist(), *[drafter.config.mask_token] * depth])
            embeds_TD = embed(read) + torch.cat([added_TD[: anchor + 1], added_TD[anchor].expand(depth, -1)])
            logits_W = drafter.model(inputs_embeds=embeds_TD[None]).logits[0, -1, ids_W].log_softmax(-1)
            index = (ids_W == tokens_T[label]).nonzero()[:, 0]
            ce = -logits_W[index].sum()  # 0 for a token that is not listed
            theirs_W = theirs_TV[label - 1, ids_W].log_softmax(-1)
            kl = (theirs_W.exp() * (theirs_W - logits_W)).sum()
            losses.append({"ce": ce, "forward_kl": kl, "pard2": 0.1 * ce + kl}[loss])
            before = range(anchor + 1, label)
            chain = [theirs_TV[at - 1].softmax(-1)[tokens_T[at]] for at in before] if loss == "pard2" else []
            weights.append(math.prod(chain, start=torch.ones(())))
            num_by_depth[depth] += loss != "ce" or len(index)
        weight_N = torch.stack(weights)
        slow = slow + (torch.stack(losses) * weight_N).sum() / weight_N.sum() * int(mask_T[1:].sum())
    expected = torch.autograd.grad(slow, list(drafter.parameters()), allow_unused=True)
    fast, metrics = pard.loss(drafter, given, settings, TARGET)
    torch.testing.assert_close(fast, slow)
    found = torch.autograd.grad(fast, list(drafter.parameters()), allow_unused=True)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert [count for _, count in metrics.values()] == [count for count in num_by_depth if count]
    assert min(num_by_depth[:3]) > 0


def test_masks_are_nested_and_follow_the_shares() -> None:
    given = collate([example(list(range(3, 53)), [at >= 9 for at in range(50)], "row")])
    masks = pard.draw_masks(given, PLAIN, 8, "0")
    chains: dict[int, set[int]] = {}
    for anchor, depth in zip(masks.anchors_BM[0].tolist(), masks.depths_BM[0].tolist(), strict=True):
        chains.setdefault(anchor, set()).add(depth)
    assert all(depths == set(range(1, len(depths) + 1)) for depths in chains.values())
    counts = [sum(depth in depths for depths in chains.values()) for depth in range(1, 8)]
    assert counts == [math.ceil(41 * max(0.7**depth, 0.2)) for depth in range(1, 8)]
    assert min(chains) >= 8
    other = pard.draw_masks(given, PLAIN, 8, "1")
    assert not torch.equal(masks.anchors_BM, other.anchors_BM)


@torch.no_grad()
def test_evaluate_counts_tokens_up_to_the_first_wrong_one() -> None:
    given, drafter = batch(3), perturbed()
    right, whole = 0, 0
    anchors_BA, is_chain_BA = pard.draw_anchors(given, 4, "held out")
    for row in range(3):
        length = int(given.lengths_B[row])
        for anchor in anchors_BA[row][is_chain_BA[row]].tolist():
            labels = range(anchor + 1, anchor + 5)
            if labels[-1] >= length or not all(given.loss_mask_BT[row, at] for at in labels):
                continue
            whole += 1
            read = torch.tensor([[*given.tokens_BT[row, : anchor + 1].tolist(), *[drafter.config.mask_token] * 3]])
            drafted = drafter.model(input_ids=read).logits[0, -4:].argmax(-1).tolist()
            for at, token in zip(labels, drafted, strict=True):
                if int(given.tokens_BT[row, at]) != token:
                    break
                right += 1
    total, count = pard.evaluate(drafter, given, PLAIN, TARGET)["acceptance"]
    assert (int(total), count) == (right, whole) and whole > 0


@torch.no_grad()
def test_evaluate_with_features_also_measures_the_model_alone() -> None:
    given, drafter = batch(8), perturbed(SETTINGS)
    drafter.projection.weight.mul_(50)
    metrics = pard.evaluate(drafter, given, SETTINGS, TARGET)
    drafter.projection.weight.zero_()
    alone = pard.evaluate(drafter, given, SETTINGS, TARGET)
    assert metrics["acceptance_without_features"] == alone["acceptance"] == alone["acceptance_without_features"]
    assert any(metrics[f"mask{depth}_accuracy"] != alone[f"mask{depth}_accuracy"] for depth in range(4))


def test_build_continues_an_artifact(tmp_path: Path) -> None:
    """Of a draft LM with a tied head and a shortlist, all weights are kept, and the drafter drafts its first tokens."""
    drafter = built(lm, small_lm(TARGET, rank=8, shortlist=20), TARGET)
    draftsmith.save(drafter, tmp_path / "lm", TARGET)
    continued = pard.build(trainer_settings(pard, parts=(str(tmp_path / "lm"),)), TARGET)
    assert (continued.config.rank, continued.config.shortlist) == (8, 20)
    state = continued.state_dict()
    assert all(torch.equal(state[name], weight.float()) for name, weight in drafter.state_dict().items())


def test_check_rejects_what_cannot_be_continued(tmp_path: Path) -> None:
    target = make_target(tmp_path / "target")
    info = read_target_info(str(tmp_path / "target"))
    draftsmith.save(lookup.Drafter(lookup.Config(), target), tmp_path / "lookup", target)
    draftsmith.save(built(lm, small_lm(target), target), tmp_path / "int8", target)
    manifest = tmp_path / "int8" / "draft_config.json"
    manifest.write_text(manifest.read_text().replace('"quantised": ""', '"quantised": "int8"'))
    for changes, message in (
        ({"parts": (str(tmp_path / "lookup"),)}, "is of family 'lookup'; PARD continues a draft LM"),
        ({"parts": (str(tmp_path / "int8"),)}, "is quantised and cannot be trained"),
        ({"mask_token": VOCAB_SIZE}, f"mask_token is {VOCAB_SIZE}"),
        ({"num_layers": 4}, "num_layers is 4; .* has 3 layers to copy"),
        ({"features": (3, 4)}, r"features is \[3, 4\]; .* has hidden layers 0 to 3"),
    ):
        with pytest.raises(ValueError, match=message):
            pard.check(trainer_settings(pard, **changes), info)
    with pytest.raises(ValueError, match="feature_dropout is 1.0; it must be at least 0 and below 1"):
        trainer_settings(pard, feature_dropout=1.0)
    with pytest.raises(ValueError, match="parts names 2 artifacts"):
        Settings(parts=("a", "b"))


@pytest.mark.parametrize("architecture", ["gpt2", "gpt_neox", "qwen3"])
def test_build_continues_models_that_honour_masks(architecture: str) -> None:
    target = Target(tiny_model(architecture))
    drafter = pard.build(SETTINGS, target)
    assert drafter.projection is not None
    given = complete(batch(), target, tuple(range(target.num_layers + 1)))
    pard.begin_step(drafter, SETTINGS, 0, 1)
    assert torch.isfinite(pard.loss(drafter, given, SETTINGS, target)[0])


@pytest.mark.parametrize(("architecture", "message"), [("gemma2", "layers that see a window of the text")])
def test_build_rejects_models_that_masks_cannot_be_trained_in(architecture: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pard.build(SETTINGS, Target(tiny_model(architecture)))
