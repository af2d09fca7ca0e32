"""The distilling trainer: its losses against transformers' and slow ones, what it starts from, and its judgement."""

from pathlib import Path

import pytest
import torch
from torch.nn import functional

from data.batches import Batch, collate, example
from data.teacher import complete
from draftsmith.facts import read_facts
from tests.models import VOCAB_SIZE, tiny_model, tiny_target, tiny_tokenizer
from trainers import distill
from trainers.losses import DIVERGENCES, Teacher, divergence

TARGET = tiny_target("llama")
SMALL = {"hidden_size": 16, "num_heads": 2}


def batch(settings: distill.Settings) -> Batch:
    """Returns rows of 9, 12 and 15 tokens, partly supervised, with what the settings need of the target."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for row in range(3):
        length = 9 + 3 * row
        mask = [position >= 2 + row and position != 7 for position in range(length)]
        rows.append(example(torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist(), mask, str(row)))
    needs = distill.needs(settings, TARGET)
    return complete(collate(rows), TARGET, needs.layers + needs.held_out_layers, needs.top_k)


def test_cross_entropy_is_that_of_transformers() -> None:
    """Value and gradients against the model's own loss on labels."""
    torch.manual_seed(0)
    settings = distill.Settings(**SMALL)
    drafter, given = distill.build(settings, TARGET), batch(settings)
    found, _ = distill.loss(drafter, given, settings, TARGET)
    labels = given.tokens_BT.masked_fill(~given.loss_mask_BT, -100)
    count = int(given.loss_mask_BT.sum())
    expected = drafter.model(input_ids=given.tokens_BT, labels=labels).loss * count
    torch.testing.assert_close(found, expected)
    parameters = list(drafter.parameters())
    torch.testing.assert_close(
        torch.autograd.grad(found, parameters), torch.autograd.grad(expected, parameters), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("top_k", [0, 5])
@pytest.mark.parametrize("name", sorted(DIVERGENCES))
def test_divergences_compare_both_laws_after_the_same_tokens(name: str, top_k: int) -> None:
    """Both models' own logits at t, for every t whose next token is supervised."""
    torch.manual_seed(0)
    settings = distill.Settings(loss=name, teacher_top_k=top_k, beta=0.3, **SMALL)
    drafter, given = distill.build(settings, TARGET), batch(settings)
    found, _ = distill.loss(drafter, given, settings, TARGET)
    student, theirs = (m(input_ids=given.tokens_BT).logits for m in (drafter.model, TARGET.model))
    terms = []
    for row, t in given.loss_mask_BT[:, 1:].nonzero().tolist():
        teacher = Teacher(logits=theirs[row, t][None])
        if top_k:
            top = theirs[row, t].topk(top_k)
            normaliser = theirs[row, t].logsumexp(-1)[None]
            teacher = Teacher(logits=top.values[None], ids_NK=top.indices[None], log_normaliser_N=normaliser)
        terms.append(divergence(name, beta=0.3)(student[row, t][None], teacher))
    torch.testing.assert_close(found, torch.cat(terms).sum(), rtol=1e-4, atol=1e-4)


def test_four_steps() -> None:
    """The losses of four steps of AdamW, as they were when this was written (to 1e-4: one machine's float32)."""
    torch.manual_seed(0)
    settings = distill.Settings(loss="forward_kl", **SMALL)
    drafter, given = distill.build(settings, TARGET), batch(settings)
    optimizer = torch.optim.AdamW(drafter.parameters(), lr=3e-2)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss, _ = distill.loss(drafter, given, settings, TARGET)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == pytest.approx([34.375526, 31.304947, 27.309236, 23.554834], rel=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2", "gpt_neox", "opt", "phi3"])
def test_first_layers_are_the_targets(architecture: str) -> None:
    """The copy's last hidden state is the target's after that layer; with all layers its law is the target's."""
    target = tiny_target(architecture)
    drafter = distill.build(distill.Settings(start="layers", num_layers=2), target)
    tokens_BT = torch.arange(3, 11)[None]
    with torch.no_grad():
        torch.testing.assert_close(drafter.engine.read(tokens_BT, (2,))[2], target.read(tokens_BT, (2,))[2])
        whole = distill.build(distill.Settings(start="layers", num_layers=target.num_layers), target)
        given = complete(collate([example(tokens_BT[0].tolist(), None, "0")]), target, (target.num_layers,))
        metrics = distill.judge(whole, given, distill.Settings(num_draft=7), target)
    for total, count in metrics.values():
        assert (total / count).item() == pytest.approx(1.0, abs=1e-5)


def test_judgement_by_hand() -> None:
    torch.manual_seed(0)
    settings = distill.Settings(**SMALL)
    drafter, given = distill.build(settings, TARGET), batch(settings)
    with torch.no_grad():
        metrics = distill.judge(drafter, given, settings, TARGET)
        student, theirs = (m(input_ids=given.tokens_BT).logits.softmax(-1) for m in (drafter.model, TARGET.model))
    mask_BT = functional.pad(given.loss_mask_BT[:, 1:], (0, 1))
    total, count = metrics["acceptance"]
    assert count == int(mask_BT.sum())
    torch.testing.assert_close(total, torch.minimum(student, theirs).sum(-1)[mask_BT].sum())
    agrees = (student.argmax(-1) == theirs.argmax(-1))[mask_BT]
    assert metrics["greedy_agreement"][0].item() == agrees.sum()


def test_a_new_model_takes_the_targets_embedding_where_the_widths_are_the_same() -> None:
    theirs = TARGET.model.get_input_embeddings().weight
    taken = distill.build(distill.Settings(), TARGET).model.get_input_embeddings().weight
    assert torch.equal(taken, theirs)
    assert taken.data_ptr() != theirs.data_ptr()
    left = distill.build(distill.Settings(start="random"), TARGET).model.get_input_embeddings().weight
    assert not torch.equal(left, theirs)
    narrow = distill.build(distill.Settings(**SMALL), TARGET).model
    assert narrow.config.hidden_size == 16


def test_a_checkpoint_to_start_from(tmp_path: Path) -> None:
    """Its weights are taken; another vocabulary or tokenizer is refused from the folder alone."""
    model = tiny_model("gpt2", seed=3)
    model.save_pretrained(tmp_path / "same")
    drafter = distill.build(distill.Settings(init=str(tmp_path / "same")), TARGET)
    for name, weight in model.state_dict().items():
        assert torch.equal(drafter.model.state_dict()[name], weight)

    TARGET.model.save_pretrained(tmp_path / "target")
    tiny_tokenizer().save_pretrained(tmp_path / "target")
    facts = read_facts(str(tmp_path / "target"))
    tiny_tokenizer().save_pretrained(tmp_path / "same")
    distill.check(distill.Settings(init=str(tmp_path / "same")), facts)
    tiny_tokenizer(prefix="x").save_pretrained(tmp_path / "same")
    with pytest.raises(ValueError, match="another tokenizer"):
        distill.check(distill.Settings(init=str(tmp_path / "same")), facts)
    tiny_model("gpt2", vocab_size=80).save_pretrained(tmp_path / "large")
    with pytest.raises(ValueError, match="vocabulary of 80"):
        distill.check(distill.Settings(init=str(tmp_path / "large")), facts)


def test_what_is_refused() -> None:
    cases = [
        ("num_layers", {"num_layers": 0}),
        ("hidden_size", {"hidden_size": -1}),
        ("loss is ce", {"teacher_top_k": 4}),
        ("beta", {"loss": "jsd", "beta": 0.0}),
        ("must be 1", {"loss": "tvd", "teacher_top_k": 4, "loss_temperature": 2.0}),
    ]
    for message, changes in cases:
        with pytest.raises(ValueError, match=message):
            distill.Settings(**changes)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="has 3 layers to copy"):
        distill.build(distill.Settings(start="layers", num_layers=4), TARGET)
    with pytest.raises(ValueError, match="multiple of twice num_heads"):
        distill.build(distill.Settings(hidden_size=20, num_heads=4), TARGET)


@pytest.mark.parametrize(("shape", "temperature"), [("tree", 0.0), ("tree", 1.0), ("grown", 0.0)])
def test_the_shape_of_its_drafts(shape: str, temperature: float) -> None:
    settings = distill.Settings(**SMALL, shape=shape, tree_temperature=temperature, width=2, tree_nodes=5)
    drafter, given = distill.build(settings, TARGET), batch(settings)
    finished = distill.finish(drafter, settings, TARGET, [given])
    if shape == "tree":
        assert 1 <= len(finished.config.tree) <= 5 and not finished.config.width
    else:
        assert (finished.config.width, finished.config.num_nodes) == (2, 5)
    assert all(torch.equal(finished.state_dict()[name], weight) for name, weight in drafter.state_dict().items())
