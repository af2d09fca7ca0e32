"""Broken weights of targets: missing, unexpected, of another shape, or not finite."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from draftsmith import Target
from draftsmith.loading.weights import check_finite, is_finite
from tests.support.models import tiny_model

Change = Callable[[dict[str, Tensor], str], dict[str, Tensor]]
CHANGES: dict[str, tuple[Change, str]] = {
    "missing": (
        lambda tensors, name: {key: tensor for key, tensor in tensors.items() if key != name},
        "(is|are) missing, and would get random weights",
    ),
    "unexpected": (lambda tensors, name: tensors | {"model.layers.9.up": torch.zeros(2)}, "is unknown to the model"),
    "nan": (lambda tensors, name: tensors | {name: torch.full_like(tensors[name], torch.nan)}, "is not finite"),
    "infinite": (lambda tensors, name: tensors | {name: tensors[name].clone().fill_(-torch.inf)}, "is not finite"),
    "shape": (lambda tensors, name: tensors | {name: torch.zeros(3, 3)}, "is of another shape"),
}


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("change", list(CHANGES))
def test_target_with_broken_weights_is_rejected(tmp_path: Path, architecture: str, change: str) -> None:
    tiny_model(architecture).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    Target.from_pretrained(str(tmp_path))
    name, (make, message) = sorted(tensors)[-1], CHANGES[change]
    save_file(make(tensors, name), file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"target .*: tensors? .* {message}") as error:
        Target.from_pretrained(str(tmp_path))
    assert "\n" not in str(error.value)


def test_target_with_fewer_layers_in_its_checkpoint_is_rejected(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_text()
    assert '"num_hidden_layers": 3' in config
    (tmp_path / "config.json").write_text(config.replace('"num_hidden_layers": 3', '"num_hidden_layers": 4'))
    with pytest.raises(ValueError, match=r"tensors model.layers.3.* and 6 more are missing"):
        Target.from_pretrained(str(tmp_path))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn])
def test_is_finite(dtype: torch.dtype) -> None:
    tensor = torch.ones(4, 5).to(dtype)
    assert is_finite(tensor) and is_finite(tensor[:0])
    assert not is_finite(torch.full((4, 5), torch.nan).to(dtype))
    largest = torch.full((300,), torch.finfo(dtype).max, dtype=torch.float64).to(dtype)
    assert is_finite(largest)  # though its sum is not
    assert is_finite(torch.ones(3, dtype=torch.long)) and is_finite(torch.empty(2, device="meta"))


def test_check_finite_names_a_few_tensors() -> None:
    broken = {name: torch.tensor([0.0, torch.inf]) for name in "abcde"}
    with pytest.raises(ValueError, match=r"here: tensors a, b, c and 2 more are not finite \(NaN or infinite\)"):
        check_finite("here", broken.items())
