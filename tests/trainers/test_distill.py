"""Distillation of small LMs: losses against transformers' and slow ones, initial weights, and metrics."""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

import draftsmith
from data.batches import Batch, collate, example
from data.teacher import complete
from draftsmith import Target
from draftsmith.drafters.lm import Drafter
from draftsmith.loading.model_info import read_target_info
from draftsmith.parts.neural.shortlist import Shortlist
from tests.support import runs
from tests.support.family import check_greedy
from tests.support.masked_batch import masked_batch
from tests.support.models import SEQ2SEQ, VOCAB_SIZE, tiny_config, tiny_model, tiny_target, tiny_tokenizer
from tests.support.runs import make_data, make_target, trainer_settings
from trainers import distill
from trainers.parts.losses import DIVERGENCES, Teacher, divergence, jensen_shannon, on_shortlist
from trainers.training.loop import train
from trainers.training.run_settings import RunSettings

TARGET = tiny_target("llama")
SMALL = {"hidden_size": 16, "num_heads": 2}
SETTINGS = trainer_settings(distill, rank=8, shortlist=40)


def batch(settings: distill.Settings) -> Batch:
    """Returns rows of 9, 12 and 15 tokens, partly supervised, with the target outputs that the settings need."""
    needs = distill.needs(settings, TARGET)
    return complete(masked_batch(), TARGET, needs.layers + needs.held_out_layers, needs.top_k)


def test_cross_entropy_equals_that_of_transformers() -> None:
    """Value and gradients equal those of the model's own loss on labels."""
    torch.manual_seed(0)
    settings = trainer_settings(distill, **SMALL)
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
def test_divergences_compare_both_models_after_the_same_tokens(name: str, top_k: int) -> None:
    """Both models' own logits at t, for every t whose next token is supervised."""
    torch.manual_seed(0)
    settings = trainer_settings(distill, loss=name, teacher_top_k=top_k, beta=0.3, **SMALL)
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


LISTED = torch.arange(1, VOCAB_SIZE, 3)


def drafter_with_shortlist(settings: distill.Settings) -> tuple[Drafter, Batch]:
    """Returns a drafter whose shortlist is LISTED, and a batch."""
    torch.manual_seed(0)
    drafter = distill.build(settings, TARGET)
    drafter.shortlist.set_tokens(LISTED)
    return drafter, batch(settings)


@pytest.mark.parametrize("rank", [0, 8])
def test_cross_entropy_skips_tokens_off_the_shortlist(rank: int) -> None:
    settings = trainer_settings(distill, **SMALL, rank=rank, shortlist=len(LISTED))
    drafter, given = drafter_with_shortlist(settings)
    found, metrics = distill.loss(drafter, given, settings, TARGET)
    logits_BTW = drafter.model(input_ids=given.tokens_BT).logits[..., LISTED]
    terms, num_outside = [], 0
    for row, t in given.loss_mask_BT[:, 1:].nonzero().tolist():
        index = (given.tokens_BT[row, t + 1] == LISTED).nonzero().flatten()
        num_outside += len(index) == 0
        terms += [-logits_BTW[row, t].log_softmax(-1)[index]]
    torch.testing.assert_close(found, torch.cat(terms).sum())
    assert metrics["outside"][0] == num_outside > 0 and metrics["outside"][1] == len(terms) > num_outside


@pytest.mark.parametrize("top_k", [0, VOCAB_SIZE])
@pytest.mark.parametrize("name", sorted(DIVERGENCES))
def test_divergences_condition_the_target_on_the_shortlist(name: str, top_k: int) -> None:
    settings = trainer_settings(distill, loss=name, teacher_top_k=top_k, beta=0.3, **SMALL, shortlist=len(LISTED))
    drafter, given = drafter_with_shortlist(settings)
    found, metrics = distill.loss(drafter, given, settings, TARGET)
    student, theirs = (m(input_ids=given.tokens_BT).logits[:, :-1, LISTED] for m in (drafter.model, TARGET.model))
    is_learnt = given.loss_mask_BT[:, 1:]
    expected = divergence(name, beta=0.3)(student[is_learnt], Teacher(logits=theirs[is_learnt])).sum()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert 0 < metrics["outside"][0] < metrics["outside"][1]
    found.backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in drafter.parameters())


@pytest.mark.parametrize("name", sorted(DIVERGENCES))
def test_on_shortlist_with_top_logits(name: str) -> None:
    """Outcomes by hand: the listed tokens among the top five, and any other, without the mass known to be unlisted."""
    torch.manual_seed(0)
    shortlist = Shortlist(len(LISTED), VOCAB_SIZE)
    shortlist.set_tokens(LISTED)
    teacher_NV, student_NW = 2 * torch.randn(6, VOCAB_SIZE).double(), torch.randn(6, len(LISTED)).double()
    top = teacher_NV.topk(5)
    given = Teacher(logits=top.values, ids_NK=top.indices, log_normaliser_N=teacher_NV.logsumexp(-1))
    found_N = divergence(name)(*on_shortlist(student_NW, given, shortlist))
    for teacher_V, student_W, ids, found in zip(teacher_NV, student_NW, top.indices.tolist(), found_N, strict=True):
        p, q = teacher_V.softmax(-1), dict(zip(LISTED.tolist(), student_W.softmax(-1).tolist(), strict=True))
        inside = [token for token in ids if token in q]
        mass = 1 - sum(p[token].item() for token in ids if token not in q)
        theirs = [p[token].item() / mass for token in inside]
        own = [q[token] for token in inside]
        both = (torch.tensor([*probs, 1 - sum(probs)]).double().log()[None] for probs in (own, theirs))
        expected = (partial(jensen_shannon, beta=0.5) if name == "jsd" else DIVERGENCES[name])(*both)
        torch.testing.assert_close(found, expected[0], rtol=1e-5, atol=1e-6)


def test_acceptance_counts_mass_off_the_shortlist_as_rejected() -> None:
    settings = trainer_settings(distill, **SMALL, shortlist=len(LISTED))
    drafter, given = drafter_with_shortlist(settings)
    with torch.no_grad():
        total, count = distill.evaluate(drafter, given, settings, TARGET)["acceptance"]
        student, theirs = (m(input_ids=given.tokens_BT).logits[:, :-1] for m in (drafter.model, TARGET.model))
    both = torch.minimum(student[..., LISTED].softmax(-1), theirs.softmax(-1)[..., LISTED]).sum(-1)
    assert count == given.loss_mask_BT[:, 1:].sum()
    torch.testing.assert_close(total, both[given.loss_mask_BT[:, 1:]].sum())


def test_prepare_lists_the_most_frequent_supervised_tokens() -> None:
    """Ties go to lower ids."""
    rows = [
        example([9, 9, 9, 7, 5, 5, 4], [False, False, True, True, True, True, True], "0"),
        example([3, 8], None, "1"),
    ]
    settings = trainer_settings(distill, **SMALL, rank=4, shortlist=4)
    drafter = distill.build(settings, TARGET)
    distill.prepare(drafter, settings, TARGET, rows)
    assert drafter.shortlist.ids_W.tolist() == [3, 4, 5, 7]


def test_initial_weights_of_a_model_tied_to_the_target() -> None:
    """The embedding map is the identity; the head projects onto the principal directions of the target's LM head."""
    drafter = distill.build(trainer_settings(distill, rank=8), TARGET)
    words, head = drafter.model.get_input_embeddings(), drafter.model.get_output_embeddings()
    tokens = torch.arange(3, 9)
    torch.testing.assert_close(words(tokens), head.embed(tokens))
    rows_VD = TARGET.model.get_output_embeddings().weight.detach()
    kept = ((rows_VD - rows_VD.mean(0)) @ head.widen.weight).square().sum()
    spread = torch.linalg.svdvals(rows_VD - rows_VD.mean(0)).square()
    torch.testing.assert_close(kept, spread[:8].sum())
    assert drafter.model(input_ids=tokens[None]).logits.std() < 2


def test_four_steps_have_golden_losses() -> None:
    """Losses of four AdamW steps equal recorded values to 1e-4, for float32 on other machines."""
    torch.manual_seed(0)
    settings = trainer_settings(distill, loss="forward_kl", **SMALL)
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
def test_start_layers_copies_the_targets_first_layers(architecture: str) -> None:
    """The copy's last hidden state is the target's after that layer; a full copy has the target's distribution."""
    target = tiny_target(architecture)
    drafter = distill.build(trainer_settings(distill, start="layers", num_layers=2), target)
    tokens_BT = torch.arange(3, 11)[None]
    with torch.no_grad():
        torch.testing.assert_close(drafter.draft_model.read(tokens_BT, (2,))[2], target.read(tokens_BT, (2,))[2])
        whole = distill.build(trainer_settings(distill, start="layers", num_layers=target.num_layers), target)
        given = complete(collate([example(tokens_BT[0].tolist(), None, "0")]), target, (target.num_layers,))
        metrics = distill.evaluate(whole, given, trainer_settings(distill, num_draft=7), target)
    for total, count in metrics.values():
        assert (total / count).item() == pytest.approx(1.0, abs=1e-5)


def source_batch(target: Target, settings: distill.Settings) -> Batch:
    """Returns two rows of an encoder-decoder's text with their sources."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, VOCAB_SIZE, (size,), generator=generator).tolist() for size in (9, 6, 12, 7)]
    pairs = [example([0, *text], None, str(len(text)), source=source) for text, source in (rows[:2], rows[2:])]
    needs = distill.needs(settings, target)
    return complete(collate(pairs), target, needs.layers + needs.held_out_layers, needs.top_k)


@pytest.mark.parametrize("architecture", SEQ2SEQ)
def test_a_full_copy_of_an_encoder_decoder_has_its_distribution(architecture: str) -> None:
    """Student and teacher positions are aligned, and both read the source."""
    target = tiny_target(architecture)
    settings = trainer_settings(distill, start="layers", num_layers=target.num_layers, num_draft=5)
    given = source_batch(target, settings)
    with torch.no_grad():
        metrics = distill.evaluate(distill.build(settings, target), given, settings, target)
    for total, count in metrics.values():
        assert (total / count).item() == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("encoder_layers", [0, 1])
@pytest.mark.parametrize("architecture", SEQ2SEQ)
def test_encoder_decoder_draft_models_read_previous_tokens_and_the_source(
    architecture: str, encoder_layers: int
) -> None:
    """A token changes the features from its position on, as it does the target's; the source changes all of them."""
    torch.manual_seed(0)
    target = tiny_target(architecture)
    settings = trainer_settings(distill, **SMALL, encoder_layers=encoder_layers)
    drafter, given = distill.build(settings, target), source_batch(target, settings)
    assert given.source_BS is not None
    tokens_BT, source_BS = given.tokens_BT.clone(), given.source_BS.clone()
    tokens_BT[:, 4], source_BS[:, 2] = 3, 3
    with torch.no_grad():
        for changes, first in (({"tokens_BT": tokens_BT}, 4), ({"source_BS": source_BS, "source": None}, 0)):
            other = complete(dataclasses.replace(given, hidden={}, **changes), target, tuple(given.hidden))
            for before, after in (
                (distill._normed(drafter, given), distill._normed(drafter, other)),
                (given.hidden[target.num_layers], other.hidden[target.num_layers]),
            ):
                changed_T = (before - after).abs().amax(dim=(0, 2)) > 1e-6
                assert changed_T.tolist() == [at >= first for at in range(tokens_BT.shape[1])]


@pytest.mark.parametrize("is_causal", [False, True])
def test_init_from_a_checkpoint_for_an_encoder_decoder(is_causal: bool, tmp_path: Path) -> None:
    """The checkpoint is an encoder-decoder, or a causal model that does not read the source."""
    target, model = tiny_target("t5"), tiny_model("llama" if is_causal else "bart", seed=3)
    model.save_pretrained(tmp_path)
    settings = trainer_settings(distill, init=str(tmp_path))
    drafter, given = distill.build(settings, target), source_batch(target, settings)
    source = {} if is_causal else {"input_ids": given.source_BS, "attention_mask": given.source.mask_BT}
    decoded = {"input_ids" if is_causal else "decoder_input_ids": given.tokens_BT}
    with torch.no_grad():
        logits_BTV = distill._head(drafter)(distill._normed(drafter, given).flatten(0, 1)).view(2, -1, VOCAB_SIZE)
        torch.testing.assert_close(logits_BTV, model(**source, **decoded).logits, rtol=1e-4, atol=1e-4)
    if not is_causal:
        tiny_config("llama").save_pretrained(tmp_path / "llama")
        causal = read_target_info(str(tmp_path / "llama"))
        with pytest.raises(ValueError, match="is an encoder-decoder and target .* is not"):
            distill.check(settings, causal)


def test_a_run_for_an_encoder_decoder(tmp_path: Path) -> None:
    """The loop passes sources to the trainer, and the artifact drafts for the target."""
    data = make_data(make_target(tmp_path / "target", "t5"), tmp_path / "data", num_rows=24, max_new_tokens=12)
    paths = {"target": str(tmp_path / "target"), "data": str(data), "output": str(tmp_path / "run")}
    output = train(distill, dataclasses.replace(SETTINGS, loss="lk"), RunSettings(**paths, **runs.SMALL))
    check_greedy(draftsmith.load(output, Target.from_pretrained(paths["target"], dtype="float32")), "t5")


def test_evaluate_equals_metrics_by_hand() -> None:
    torch.manual_seed(0)
    settings = trainer_settings(distill, **SMALL)
    drafter, given = distill.build(settings, TARGET), batch(settings)
    with torch.no_grad():
        metrics = distill.evaluate(drafter, given, settings, TARGET)
        student, theirs = (m(input_ids=given.tokens_BT).logits.softmax(-1) for m in (drafter.model, TARGET.model))
    mask_BT = functional.pad(given.loss_mask_BT[:, 1:], (0, 1))
    total, count = metrics["acceptance"]
    assert count == int(mask_BT.sum())
    torch.testing.assert_close(total, torch.minimum(student, theirs).sum(-1)[mask_BT].sum())
    agrees = (student.argmax(-1) == theirs.argmax(-1))[mask_BT]
    assert metrics["greedy_agreement"][0].item() == agrees.sum()


def test_a_new_model_starts_from_the_targets_embedding_of_the_same_width() -> None:
    theirs = TARGET.model.get_input_embeddings().weight
    taken = distill.build(distill.Settings(), TARGET).model.get_input_embeddings().weight
    assert torch.equal(taken, theirs)
    assert taken.data_ptr() != theirs.data_ptr()
    left = distill.build(trainer_settings(distill, start="random"), TARGET).model.get_input_embeddings().weight
    assert not torch.equal(left, theirs)
    narrow = distill.build(trainer_settings(distill, **SMALL), TARGET).model
    assert narrow.config.hidden_size == 16


def test_init_from_a_checkpoint(tmp_path: Path) -> None:
    """Another vocabulary or tokenizer raises ValueError from the folder alone."""
    model = tiny_model("gpt2", seed=3)
    model.save_pretrained(tmp_path / "same")
    drafter = distill.build(trainer_settings(distill, init=str(tmp_path / "same")), TARGET)
    for name, weight in model.state_dict().items():
        assert torch.equal(drafter.model.state_dict()[name], weight)

    TARGET.model.save_pretrained(tmp_path / "target")
    tiny_tokenizer().save_pretrained(tmp_path / "target")
    target_info = read_target_info(str(tmp_path / "target"))
    tiny_tokenizer().save_pretrained(tmp_path / "same")
    distill.check(trainer_settings(distill, init=str(tmp_path / "same")), target_info)
    tiny_tokenizer(prefix="x").save_pretrained(tmp_path / "same")
    with pytest.raises(ValueError, match="another tokenizer"):
        distill.check(trainer_settings(distill, init=str(tmp_path / "same")), target_info)
    tiny_model("gpt2", vocab_size=80).save_pretrained(tmp_path / "large")
    with pytest.raises(ValueError, match="vocabulary of 80"):
        distill.check(trainer_settings(distill, init=str(tmp_path / "large")), target_info)


@pytest.mark.parametrize("vocab_size", [VOCAB_SIZE + 16, VOCAB_SIZE - 8])
def test_init_from_a_model_whose_embedding_is_padded_otherwise(vocab_size: int, tmp_path: Path) -> None:
    for name, model in (("target", TARGET.model), ("draft", tiny_model("gpt2", vocab_size=vocab_size, seed=3))):
        model.save_pretrained(tmp_path / name)
        tiny_tokenizer(VOCAB_SIZE - 8).save_pretrained(tmp_path / name)
    settings = trainer_settings(distill, init=str(tmp_path / "draft"))
    distill.check(settings, read_target_info(str(tmp_path / "target")))
    drafter = distill.build(settings, TARGET)
    assert drafter.config.model["vocab_size"] == VOCAB_SIZE
    own, both = drafter.model.get_input_embeddings().weight, min(vocab_size, VOCAB_SIZE)
    assert len(own) == VOCAB_SIZE and torch.equal(own[:both], model.get_input_embeddings().weight[:both])
    out = draftsmith.generate(TARGET, [[4, 5, 6]], drafter.eval(), max_new_tokens=8)
    plain = draftsmith.generate(TARGET, [[4, 5, 6]], max_new_tokens=8)
    assert out.sequences.tolist() == plain.sequences.tolist()


def test_invalid_settings_raise(tmp_path: Path) -> None:
    cases = [
        ("num_layers", {"num_layers": 0}),
        ("hidden_size", {"hidden_size": -1}),
        ("apply to divergences only", {"teacher_top_k": 4}),
        ("beta", {"loss": "jsd", "beta": 0.0}),
        ("must be 1", {"loss": "tvd", "teacher_top_k": 4, "loss_temperature": 2.0}),
        ("rank is -1", {"rank": -1}),
        ("and init has its own", {"rank": 4, "init": "somewhere"}),
        ("and start layers has its own", {"rank": 4, "start": "layers"}),
        ("encoder_layers is for a new model", {"encoder_layers": 1, "start": "layers"}),
    ]
    for message, changes in cases:
        with pytest.raises(ValueError, match=message):
            trainer_settings(distill, **changes)
    invalid: list[tuple[str, dict[str, Any], str]] = [
        ("shortlist is 65; it must lie between", {"shortlist": 65}, "llama"),
        ("verifies chains only", {"shape": "tree"}, "t5"),
        ("is not an encoder-decoder", {"encoder_layers": 1}, "llama"),
    ]
    for message, changes, architecture in invalid:
        tiny_config(architecture).save_pretrained(tmp_path / architecture)
        known = read_target_info(str(tmp_path / architecture))
        with pytest.raises(ValueError, match=message):
            distill.check(trainer_settings(distill, **changes), known)
    with pytest.raises(ValueError, match="has 3 layers to copy"):
        distill.build(trainer_settings(distill, start="layers", num_layers=4), TARGET)
    with pytest.raises(ValueError, match="multiple of twice num_heads"):
        distill.build(trainer_settings(distill, hidden_size=20, num_heads=4), TARGET)


@pytest.mark.parametrize(("shape", "temperature"), [("tree", 0.0), ("tree", 1.0), ("grown", 0.0)])
def test_finish_sets_the_shape_of_drafts(shape: str, temperature: float) -> None:
    settings = trainer_settings(distill, **SMALL, shape=shape, tree_temperature=temperature, width=2, tree_nodes=5)
    drafter, given = distill.build(settings, TARGET), batch(settings)
    finished = distill.finish(drafter, settings, TARGET, [given])
    if shape == "tree":
        assert 1 <= len(finished.config.tree) <= 5 and not finished.config.width
    else:
        assert (finished.config.width, finished.config.num_nodes) == (2, 5)
    assert all(torch.equal(finished.state_dict()[name], weight) for name, weight in drafter.state_dict().items())
