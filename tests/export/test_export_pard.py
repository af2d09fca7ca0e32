"""Exports of PARD's draft models: an ordinary model with the mask token in its configuration."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import draftsmith
from draftsmith import Target
from draftsmith.drafters import pard
from draftsmith.export import export
from tests.drafters.test_pard import small
from tests.export.test_export_servers import export_drafter, flags, speculative_config
from tests.support.family import built
from tests.support.models import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    folder = tmp_path_factory.mktemp("pard") / "target"
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return Target.from_pretrained(str(folder), dtype="float32")


def test_vllm_export_is_a_model_with_its_mask_token(target: Target, tmp_path: Path) -> None:
    drafter = built(pard, small(target), target)
    out, launch = export_drafter(drafter, "vllm", tmp_path)
    config = json.loads((out / "config.json").read_text())
    assert (config["pard_token"], config["spd_type"]) == (63, "pard")
    given = speculative_config(launch)
    assert (given["method"], given["num_speculative_tokens"], given["parallel_drafting"]) == ("draft_model", 4, True)
    loaded = AutoModelForCausalLM.from_pretrained(out)
    tokens_1T = torch.tensor([[5, 6, 7, 63, 63]])
    assert torch.equal(loaded(tokens_1T).logits, drafter.model(tokens_1T).logits)


def test_sglang_export_says_that_it_drafts_token_by_token(target: Target, tmp_path: Path) -> None:
    _, launch = export_drafter(built(pard, small(target), target), "sglang", tmp_path)
    assert flags(launch)["--speculative-algorithm"] == "STANDALONE"
    assert "token by token" in launch["notes"][0]


@pytest.mark.parametrize("engine", ["vllm", "sglang", "openvino"])
def test_export_of_a_model_with_features_says_what_it_accepts_without(
    target: Target, tmp_path: Path, engine: str
) -> None:
    """The model is written without the projection; what engines then draft is what it drafts with nothing added."""
    drafter = built(pard, small(target, features=(1, 3)), target)
    measured = {"acceptance": 1.5, "acceptance_without_features": 1.25}
    draftsmith.save(drafter, tmp_path / "artifact", target, record={"measured_acceptance": measured})
    export(tmp_path / "artifact", engine, tmp_path / "out")
    launch = json.loads((tmp_path / "out" / "launch.json").read_text())
    assert "on held-out text 1.25 a draft instead of 1.50." in launch["notes"][0]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokens_1T = torch.tensor([[5, 6, 7, 63, 63]])
    assert torch.equal(loaded(tokens_1T).logits, drafter.model(tokens_1T).logits)


def test_export_rejects_a_tied_model(target: Target, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not an ordinary model; train one without them"):
        export_drafter(built(pard, small(target, rank=8, shortlist=20), target), "vllm", tmp_path)
    assert not (tmp_path / "out").exists()
