"""Tests of loading weights saved when a drafter's modules had other names."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import draftsmith
from draftsmith.artifacts.model_card import WEIGHTS
from draftsmith.drafters import lstm
from draftsmith.parts.neural.former_names import accept_former_names
from tests.support.family import built
from tests.support.models import tiny_target


def test_accept_former_names_renames_children_below_any_prefix() -> None:
    child = torch.nn.Sequential()
    child.now = torch.nn.Linear(2, 3)  # type: ignore[assignment]
    accept_former_names(child, {"before": "now"})
    whole = torch.nn.Sequential(child, torch.nn.Linear(2, 3))
    tensors = {name.replace("0.now", "0.before"): value + 1 for name, value in whole.state_dict().items()}
    whole.load_state_dict(tensors)
    assert torch.equal(whole.state_dict()["0.now.weight"], tensors["0.before.weight"])


def test_artifact_with_former_names_loads(tmp_path: Path) -> None:
    target = tiny_target("t5")
    drafter = built(lstm, lstm.Config(hidden_size=24, rank=8), target)
    draftsmith.save(drafter, tmp_path / "artifact", target=target)
    file = tmp_path / "artifact" / WEIGHTS
    former = {"tied_head": "ends", "cross_attention": "reader"}
    tensors = load_file(file)
    renamed = {
        ".".join([former.get(name.split(".")[0], name.split(".")[0]), *name.split(".")[1:]]): value
        for name, value in tensors.items()
    }
    save_file(renamed, file)
    assert renamed.keys() != tensors.keys()
    loaded = draftsmith.load(tmp_path / "artifact", target).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in tensors.items())
    save_file(renamed | {"other.weight": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match="tensor 'other.weight' is unknown to this drafter"):
        draftsmith.load(tmp_path / "artifact", target)
