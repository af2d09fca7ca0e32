"""Exports for transformers accept the tokens that draftsmith accepts: what `launch.json` promises, per position.

Shape suffixes: T tokens.
"""

import copy
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.generation import candidate_generator

import draftsmith
from draftsmith import Target
from draftsmith.drafters import early_exit, lm, lookup
from draftsmith.export import export
from draftsmith.export.launch import read_launch
from eval.doctor.serving import StepSizes
from tests.support.family import built
from tests.support.models import tiny_config, tiny_model, tiny_tokenizer

NUM_NEW, NUM_DRAFT = 28, 4


def noisy_copy(target: Target, length: str) -> lm.Drafter:
    """Returns a draft model whose tokens are accepted sometimes: the target with noise on its weights."""
    config = lm.Config(model=tiny_config("llama").to_dict(), num_draft=NUM_DRAFT, length=length)
    drafter = lm.Drafter(config, target)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight, theirs in zip(drafter.model.parameters(), target.model.parameters(), strict=True):
            weight.copy_(theirs + 0.1 * theirs.std() * torch.randn(theirs.shape, generator=generator))
    return drafter.eval()


def exit_of(target: Target, length: str, *, own_norm: bool) -> early_exit.Drafter:
    config = early_exit.Config(exit_layer=2, own_norm=own_norm, num_draft=NUM_DRAFT, length=length)
    drafter = early_exit.Drafter(config, target)
    drafter.on_weights_loaded()
    return drafter.eval()


def lookup_of(target: Target) -> lookup.Drafter:
    return lookup.Drafter(lookup.Config(num_draft=NUM_DRAFT, max_ngram=2, earliest=True), target)


MAKERS: dict[str, Callable[[Target], Any]] = {
    "lm": lambda target: noisy_copy(target, "fixed"),
    "lm, confidence": lambda target: noisy_copy(target, "confidence=0.3"),
    "early_exit": lambda target: exit_of(target, "fixed", own_norm=False),
    "early_exit, confidence": lambda target: exit_of(target, "confidence=0.3", own_norm=False),
    "early_exit, own norm": lambda target: exit_of(target, "fixed", own_norm=True),
    "lookup": lookup_of,
}


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    folder = tmp_path_factory.mktemp("acceptance") / "target"
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return Target.from_pretrained(str(folder), dtype="float32")


def rows_of(num_rows: int) -> list[list[int]]:
    """Returns prompts that repeat themselves, with changes."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for _ in range(num_rows):
        phrase = torch.randint(3, 64, (5,), generator=generator).tolist()
        changed = torch.randint(3, 64, (2,), generator=generator).tolist()
        rows.append(phrase + changed + phrase[:3] + changed[:1] + phrase[:2])
    return rows


def accepted_here(drafter: Any, rows: list[list[int]], *, num_new: int = NUM_NEW, **sampling: Any) -> list[list[int]]:
    """Returns the number of tokens accepted in each round, for each row."""
    found = []
    for row in rows:
        sizes = StepSizes()
        draftsmith.generate(
            drafter.target, [row], drafter, max_new_tokens=num_new, eos_token_id=[], streamer=sizes, **sampling
        )
        found.append([size - 1 for size in sizes.sizes[1:]])
    return found


def rounds_there(out: Path, rows: list[list[int]], **sampling: Any) -> list[list[tuple[int, int]]]:
    """Returns tokens drafted and accepted per round for the export's own `command`, from the target's forwards."""
    launch = read_launch(out)
    names = {"AutoModelForCausalLM": AutoModelForCausalLM, "GenerationConfig": GenerationConfig}
    model = names["model"] = AutoModelForCausalLM.from_pretrained(launch["target"])
    calls: list[tuple[int, int]] = []
    num_layers = model.config.num_hidden_layers

    def record(_: Any, args: Any, kwargs: Any) -> None:
        if model.config.num_hidden_layers == num_layers:  # an early exit drafts with the model itself
            past = kwargs.get("past_key_values")
            calls.append((0 if past is None else past.get_seq_length(), kwargs["input_ids"].shape[1]))

    model.register_forward_pre_hook(record, with_kwargs=True)
    lines = launch["command"].splitlines()[4:]
    for line in lines[:-1]:
        exec(line, names)
    # A pad token that is in no text: transformers hides it from its assistant.
    settings = {"do_sample": False, "max_new_tokens": NUM_NEW, "eos_token_id": None, "pad_token_id": 64} | sampling
    call = lines[-1].replace("max_new_tokens=64, do_sample=False", "**chosen")
    assert call != lines[-1]
    found = []
    for row in rows:
        calls.clear()
        ids_1T = torch.tensor([row])
        given = names | {"chosen": settings, "inputs": {"input_ids": ids_1T, "attention_mask": ids_1T * 0 + 1}}
        exec(call, given)
        starts = [len(row), *(past + 1 for past, _ in calls[1:]), len(row) + NUM_NEW]
        drafted = [fed - (len(row) if number == 0 else 1) for number, (_, fed) in enumerate(calls)]
        accepted = [following - start - 1 for start, following in itertools.pairwise(starts)]
        found.append(list(zip(drafted, accepted, strict=True)))
    return found


def exported(target: Target, folder: Path, name: str) -> tuple[Any, Path]:
    drafter = MAKERS[name](target)
    draftsmith.save(drafter, folder / "artifact", target)
    return drafter, export(folder / "artifact", "transformers", folder / "out")


@pytest.mark.parametrize(
    "name", [pytest.param(one, marks=[pytest.mark.slow] * (one == "early_exit, confidence")) for one in MAKERS]
)
def test_transformers_drafts_and_accepts_the_same_tokens_in_every_round(
    target: Target, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # With scikit-learn, transformers moves an assistant's threshold, as launch.json says.
    monkeypatch.setattr(candidate_generator, "is_sklearn_available", lambda: False)
    drafter, out = exported(target, tmp_path, name)
    rows = rows_of(5)
    expected = accepted_here(drafter, rows)
    there = rounds_there(out, rows)
    assert [[accepted for _, accepted in rounds] for rounds in there] == expected
    assert max(drafted for rounds in there for drafted, _ in rounds) <= NUM_DRAFT
    flat = [number for row in expected for number in row[:-1]]
    assert 0 < sum(flat) < NUM_DRAFT * len(flat), "all or nothing is accepted: no comparison is possible"
    notes = "".join(read_launch(out)["notes"])
    assert ("hides the pad token from its assistant" in notes) == (name != "lookup")
    assert ("scikit-learn" in notes) == (name == "lm, confidence")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lm", "early_exit", "early_exit, own norm", "lookup"])
def test_transformers_accepts_as_many_tokens_at_temperature_1(target: Target, tmp_path: Path, name: str) -> None:
    """The share of rounds that accept each position, to five standard errors of the difference."""
    torch.manual_seed(0)
    drafter, out = exported(target, tmp_path, name)
    rows = rows_of(60)
    rounds = rounds_there(out, rows, do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
    there = [[accepted for _, accepted in row] for row in rounds]
    here = accepted_here(drafter, rows, temperature=1.0)
    flat_here, flat_there = ([number for row in rounds for number in row[:-1]] for rounds in (here, there))
    for position in range(NUM_DRAFT):
        shares = [sum(number > position for number in flat) / len(flat) for flat in (flat_here, flat_there)]
        error = math.sqrt(sum(share * (1 - share) / len(flat_here) for share in shares))
        assert abs(shares[0] - shares[1]) < 5 * error + 1e-9, (position, shares)


def test_lookup_states_that_engines_copy_the_earliest_match(target: Target, tmp_path: Path) -> None:
    """Where an n-gram has two continuations, the drafter's default and the engine's draft differ."""
    row = [7, 8, 11, 12, 13, 1, 7, 8, 21, 22, 23, 2, 7, 8]
    drafted = {}
    for earliest in (False, True):
        drafter = lookup.Drafter(lookup.Config(num_draft=3, max_ngram=2, earliest=earliest), target)
        artifact, out = tmp_path / f"artifact{earliest}", tmp_path / f"out{earliest}"
        draftsmith.save(drafter, artifact, target)
        for engine in ("transformers", "vllm"):
            notes = read_launch(export(artifact, engine, out))["notes"]
            assert any("copies what followed the earliest match" in note for note in notes) != earliest
        index = lookup._Index(drafter.config, [])
        index.extend(copy.copy(row))
        drafted[earliest] = index.continuations(3)
    assert drafted == {False: [[21, 22, 23]], True: [[11, 12, 13]]}


def test_earliest_lookup_copies_to_the_end_of_the_text_and_makes_no_trees(target: Target) -> None:
    index = lookup._Index(lookup.Config(earliest=True), [])
    index.extend([9, 4, 5, 4])
    assert index.continuations(5) == [[5, 4]]
    with pytest.raises(ValueError, match="num_continuations is 2; with earliest it must be 1"):
        lookup.Config(earliest=True, num_continuations=2)
    assert built(lookup, lookup.Config(earliest=True), target).config.earliest
