"""Exports run by OpenVINO GenAI: the text is the target's, and the acceptance is that of draftsmith's own loop.

optimum-intel and OpenVINO GenAI run in `.venv-openvino` (./launch.sh serving-test --engine openvino), and draftsmith in
this environment, on the pocket target in float32.
"""

import os
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import draftsmith
from draftsmith import Target
from draftsmith.artifacts import json_text
from draftsmith.drafters import eagle3, lookup
from draftsmith.export import export
from draftsmith.export.launch import read_launch
from eval.doctor import openvino
from eval.doctor.serving import ServingCounts, StepSizes, agrees, run_draftsmith
from recipes import doctor
from tests.serving.served_drafters import (
    MAKERS,
    NUM_DRAFT,
    NUM_NEW,
    eagle3_head,
    new_tokens,
    reduced_target,
    show,
)

PYTHON = os.environ.get("DRAFTSMITH_OPENVINO_PYTHON", "")
"""The interpreter with OpenVINO GenAI and optimum-intel, which launch.sh names."""
pytestmark = [
    pytest.mark.serving,
    pytest.mark.skipif(not PYTHON, reason="run it by ./launch.sh serving-test --engine openvino"),
]


@pytest.fixture(scope="module")
def converted(target: Target, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of the converted target."""
    folder = tmp_path_factory.mktemp("openvino")
    draftsmith.save(lookup.Drafter(lookup.Config(), target), folder / "lookup", target)
    launch = read_launch(export(folder / "lookup", "openvino", folder / "out"))
    openvino.convert(PYTHON, launch)
    return launch["target"]


def exported(drafter: Any, folder: Path, **options: str) -> dict[str, Any]:
    """Returns the launch settings of a drafter that is saved, exported and converted."""
    draftsmith.save(drafter, folder / "artifact", drafter.target)
    launch = read_launch(export(folder / "artifact", "openvino", folder / "out", **options))
    if launch.get("convert"):
        openvino.convert(PYTHON, launch)
    return launch


def served(launch: dict[str, Any], prompts: Sequence[list[int]], folder: Path) -> ServingCounts:
    answers = openvino.run(PYTHON, launch["target"], prompts, NUM_NEW, folder, launch["settings"])
    return openvino.counts_of(answers, NUM_NEW, NUM_DRAFT)


def tree_counts(drafter: Any, rows: list[list[int]]) -> ServingCounts:
    """Returns draftsmith's own counts with the drafter's trees, the first token decoded plainly."""
    texts, answers = [], []
    for row in rows:
        first = draftsmith.generate(drafter.target, torch.tensor([row]), max_new_tokens=1, eos_token_id=[])
        streamer = StepSizes()
        drafter.forget()
        out = draftsmith.generate(
            drafter.target, first.sequences, drafter, max_new_tokens=NUM_NEW - 1, streamer=streamer
        )
        texts.append(out.sequences[0, len(row) : out.lengths[0]].tolist())
        answers.append({"text": texts[-1], "sizes": [1, *streamer.sizes[1:]], "num_drafted": None})
    return openvino.counts_of(answers, NUM_NEW, NUM_DRAFT)


def test_plain_decoding_gives_the_same_text(
    converted: str, rows: list[list[int]], texts: list[list[int]], tmp_path: Path
) -> None:
    found = served({"target": converted, "settings": {}}, rows, tmp_path / "run")
    assert found.texts == new_tokens(rows, texts) and sum(found.accepted) == 0


@pytest.mark.parametrize(
    "name", ["draft_model", "first_blocks", "parallel", "lookup", "head", "tree", "well_trained_block"]
)
def test_openvino_and_draftsmith_accept_the_same_drafts(
    target: Target, converted: str, rows: list[list[int]], texts: list[list[int]], tmp_path: Path, name: str
) -> None:
    drafter = MAKERS[name](target, texts, tmp_path)
    if name == "tree":
        expected = tree_counts(drafter, rows)
    else:
        # A model trained to draft in parallel is drafted with token by token.
        run = MAKERS["draft_model"](target, texts, tmp_path) if name == "parallel" else drafter
        expected = run_draftsmith(run, rows, NUM_NEW, NUM_DRAFT, cuts_last=True)
    found = served(exported(drafter, tmp_path, target_name=converted), rows, tmp_path / "run")
    show(name, found, expected)
    assert found.texts == new_tokens(rows, texts)
    assert sum(expected.accepted) > 20 and expected.accepted[1] > 0, "too few accepted tokens for a comparison"
    assert expected.accepted[0] < expected.num_drafts, "everything is accepted: no comparison is possible"
    assert found.accepted == expected.accepted and found.num_drafts == expected.num_drafts


def test_a_head_of_the_whole_vocabulary_and_the_last_layer(
    target: Target, converted: str, rows: list[list[int]], texts: list[list[int]], tmp_path: Path
) -> None:
    """The fused layers are those of the head, whatever the depth of the target: OpenVINO's own need ten blocks."""
    trained = eagle3_head(target, texts, tmp_path)
    config = replace(trained.config, layers=(1, 4, target.num_layers), draft_vocab=0)
    drafter = eagle3.Drafter(config, target)
    shared = {name: tensor for name, tensor in trained.state_dict().items() if "head." not in name and "2" not in name}
    drafter.load_state_dict(shared, strict=False)
    with torch.no_grad():
        drafter.head.weight.copy_(target.model.get_output_embeddings().weight)
    expected = run_draftsmith(drafter.eval(), rows, NUM_NEW, NUM_DRAFT, cuts_last=True)
    found = served(exported(drafter, tmp_path, target_name=converted), rows, tmp_path / "run")
    show("whole vocabulary", found, expected)
    assert found.texts == new_tokens(rows, texts) and sum(expected.accepted) > 3
    assert found.accepted == expected.accepted and found.num_drafts == expected.num_drafts


def test_a_wrong_layer_shows_in_the_acceptance(
    target: Target, converted: str, rows: list[list[int]], texts: list[list[int]], tmp_path: Path
) -> None:
    """The comparison above can fail: a head that reads other layers than it was trained on is accepted less."""
    drafter = eagle3_head(target, texts, tmp_path)
    expected = run_draftsmith(drafter, rows, NUM_NEW, NUM_DRAFT, cuts_last=True)
    wrong = eagle3.Drafter(replace(drafter.config, layers=(1, 3, 4)), target)
    wrong.load_state_dict(drafter.state_dict())
    found = served(exported(wrong, tmp_path, target_name=converted), rows, tmp_path / "run")
    assert found.texts == new_tokens(rows, texts)
    assert not agrees(found, expected), (found, expected)


def test_quantised_exports_give_the_text_of_the_quantised_target(
    target: Target, rows: list[list[int]], texts: list[list[int]], tmp_path: Path
) -> None:
    """Drafter and target in int8; a few drafts differ from those in float32."""
    drafter = reduced_target(target, texts, tmp_path)
    expected = run_draftsmith(drafter, rows, NUM_NEW, NUM_DRAFT, cuts_last=True)
    launch = exported(drafter, tmp_path, quantise="int8", quantise_target="int8")
    plain = served({"target": launch["target"], "settings": {}}, rows, tmp_path / "plain")
    found = served(launch, rows, tmp_path / "run")
    show("draft_model, int8", found, expected)
    assert found.texts == plain.texts
    assert abs(sum(found.accepted) - sum(expected.accepted)) <= 0.2 * sum(expected.accepted)


# --- What users run -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lookup", "tree", "well_trained_block"])
def test_python_of_the_launch_file_runs(
    target: Target, converted: str, texts: list[list[int]], tmp_path: Path, name: str
) -> None:
    launch = exported(MAKERS[name](target, texts, tmp_path), tmp_path, target_name=converted)
    code = launch["command"].replace("some text", "def add(a, b):").replace("=64", "=8")
    done = subprocess.run([PYTHON, "-c", code], capture_output=True, text=True, timeout=600)
    expected = draftsmith.generate(target, [target.tokenizer.encode("def add(a, b):")], max_new_tokens=8)
    new = target.tokenizer.decode(expected.sequences[0, -8:], skip_special_tokens=True)
    assert done.returncode == 0 and done.stdout.strip() == new.strip(), done.stderr[-2000:]


def test_doctor_checks_an_export_in_openvino(target: Target, texts: list[list[int]], tmp_path: Path) -> None:
    draftsmith.save(reduced_target(target, texts, tmp_path), tmp_path / "artifact", target)
    arguments = {"data": "python-source", "num_prompts": 3, "max_new_tokens": 24, "num_positions": 24, "depth": 4}
    run = doctor.DoctorSettings(
        draft=str(tmp_path / "artifact"), output=str(tmp_path / "out"), openvino_python=PYTHON, **arguments
    )
    doctor.main(run)
    report = json_text.read(tmp_path / "out" / "doctor.json")
    assert next(one["verdict"] for one in report["findings"] if one["name"] == "export") == "ok"
    shares = report["accepted_per_depth"]
    found = shares["decoding, OpenVINO GenAI"]
    assert found == pytest.approx(shares[f"decoding, {NUM_DRAFT} tokens"], abs=0.1)
