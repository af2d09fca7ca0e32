"""Exports served by vLLM: the text is the target's, and the acceptance rate is that of draftsmith's own loop.

Loaders ignore unknown tensors and initialise missing ones at random; the text stays correct then, and the mistake
shows in the acceptance rate only.
"""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import draftsmith
from draftsmith import Target
from draftsmith.export import export
from draftsmith.export.launch import read_launch
from eval.doctor.checks import check_export
from eval.doctor.serving import ServingCounts, agrees, run_draftsmith, run_vllm
from recipes import doctor
from tests.serving import served_drafters
from tests.serving.served_drafters import MAKERS, NUM_DRAFT, NUM_NEW, eagle3_head, reduced_target, show

pytest.importorskip("vllm")
pytestmark = pytest.mark.serving


# --- vLLM beside draftsmith ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(target: Target, rows: list[list[int]], tmp_path_factory: pytest.TempPathFactory) -> ServingCounts:
    return run_vllm(sys.executable, target, rows, NUM_NEW, tmp_path_factory.mktemp("plain") / "run")


def test_plain_decoding_gives_the_same_text(
    plain: ServingCounts, rows: list[list[int]], texts: list[list[int]]
) -> None:
    assert plain.texts == [text[len(row) : len(row) + NUM_NEW] for row, text in zip(rows, texts, strict=True)]


ON_GPUS_ONLY = pytest.mark.skipif(not torch.cuda.is_available(), reason="vLLM 0.32 runs DSpark on GPUs only")


@pytest.mark.parametrize(
    ("name", "to"),
    [
        *(pytest.param(name, "vllm", marks=[ON_GPUS_ONLY] * (name == "biased_block")) for name in MAKERS),
        ("head", "speculators"),
        ("block", "speculators"),
    ],
)
def test_vllm_and_draftsmith_accept_the_same_number_of_tokens(
    target: Target,
    rows: list[list[int]],
    texts: list[list[int]],
    plain: ServingCounts,
    tmp_path: Path,
    name: str,
    to: str,
) -> None:
    drafter = MAKERS[name](target, texts, tmp_path)
    # vLLM drafts chains with the head of trees.
    in_chains = eagle3_head(target, texts, tmp_path) if name == "tree" else drafter
    expected = run_draftsmith(in_chains, rows, NUM_NEW, NUM_DRAFT)
    draftsmith.save(drafter, tmp_path / "artifact", target)
    launch = read_launch(export(tmp_path / "artifact", to, tmp_path / "out"))
    found = run_vllm(sys.executable, target, rows, NUM_NEW, tmp_path / "run", launch)
    print(
        f"{name} {to}: vLLM {found.num_drafts} {found.accepted}, draftsmith {expected.num_drafts} {expected.accepted}"
    )
    assert found.texts == plain.texts
    if name == "lookup":  # vLLM counts no draft where nothing matches, and copies no further than the text's end
        found = dataclasses.replace(found, num_drafts=expected.num_drafts)
    else:
        assert found.num_drafted == NUM_DRAFT * found.num_drafts
    assert sum(expected.accepted) > 20 and expected.accepted[1] > 0, "too few accepted tokens for a comparison"
    assert expected.accepted[0] < expected.num_drafts, "everything is accepted: no comparison is possible"
    assert agrees(found, expected), (found, expected)


def test_vllm_and_draftsmith_accept_the_same_tokens_of_an_mtp_head(tmp_path: Path) -> None:
    """Of a tiny target of MiMo-7B's form, whose head was trained for seconds on its texts."""
    drafter, rows = served_drafters.mtp_head(tmp_path / "target")
    expected = run_draftsmith(drafter, rows, NUM_NEW, NUM_DRAFT)
    draftsmith.save(drafter, tmp_path / "artifact", drafter.target)
    launch = read_launch(export(tmp_path / "artifact", "vllm", tmp_path / "out"))
    served = Target.from_pretrained(launch["target"], dtype="float32")
    found = run_vllm(sys.executable, served, rows, NUM_NEW, tmp_path / "run", launch)
    show("mtp", found, expected)
    assert found.texts == expected.texts
    assert expected.num_drafts > expected.accepted[0] > expected.accepted[2] > 20, "no comparison is possible"
    assert agrees(found, expected), (found, expected)


def test_doctor_checks_an_export_in_vllm(target: Target, texts: list[list[int]], tmp_path: Path) -> None:
    draftsmith.save(reduced_target(target, texts, tmp_path), tmp_path / "artifact", target)
    arguments = {"data": "python-source", "num_prompts": 3, "max_new_tokens": 24, "num_positions": 24, "depth": 4}
    run = doctor.DoctorSettings(
        draft=str(tmp_path / "artifact"), output=str(tmp_path / "out"), vllm_python=sys.executable, **arguments
    )
    doctor.main(run)
    report = json.loads((tmp_path / "out" / "doctor.json").read_text())
    assert next(one["verdict"] for one in report["findings"] if one["name"] == "export") == "ok"
    shares = report["accepted_per_depth"]
    assert shares["decoding, vLLM"] == pytest.approx(shares[f"decoding, {NUM_DRAFT} tokens"], abs=0.1)


def test_check_export_detects_a_missing_tensor(
    target: Target, rows: list[list[int]], texts: list[list[int]], plain: ServingCounts, tmp_path: Path
) -> None:
    """vLLM loads a head with a missing tensor without a warning: its text is correct, its acceptance rate differs."""
    drafter = eagle3_head(target, texts, tmp_path)
    draftsmith.save(drafter, tmp_path / "artifact", target)
    out = export(tmp_path / "artifact", "vllm", tmp_path / "out")
    tensors = load_file(out / "model.safetensors")
    del tensors["fc.weight"]
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    found = run_vllm(sys.executable, target, rows, NUM_NEW, tmp_path / "run", read_launch(out))
    expected = run_draftsmith(drafter, rows, NUM_NEW, NUM_DRAFT)
    print(f"missing: vLLM {found.num_drafts} {found.accepted}, draftsmith {expected.num_drafts} {expected.accepted}")
    assert found.texts == plain.texts
    assert check_export(found, expected, is_tree=False).verdict == "fault", (found, expected)
