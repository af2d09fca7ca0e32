"""What importers of published drafters share: reading config.json, and loading tensors that must fit it."""

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from draftsmith.artifacts import json_text


def read_config(folder: Path, *, kind: str, speculators: tuple[str, ...]) -> dict[str, Any]:
    """Returns a published folder's config.json; `kind` is "head" or "drafter", `speculators` its types in speculators.

    Raises ValueError if it is missing, no JSON object, or of another type of speculator.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"{folder} has no config.json; name the folder of a published {kind}")
    try:
        config = json_text.read(file)
    except ValueError as error:
        raise ValueError(f"{error}; download the {kind} again") from None
    if not isinstance(config, dict):
        raise ValueError(f"{file} is not a JSON object; name the folder of a published {kind}")
    if (found := config.get("speculators_model_type", speculators[0])) not in speculators:
        raise ValueError(f"{folder} is a speculator of type {found!r}; expected {' or '.join(map(repr, speculators))}")
    return config


def load_tensors(drafter: nn.Module, tensors: dict[str, Tensor], folder: Path, *, kind: str, described_by: str) -> None:
    """Loads tensors by draftsmith's names; raises ValueError for one that is missing, unknown or of another shape.

    `kind` is "head" or "drafter", and `described_by` names what the drafter's shape was read from.
    """
    expected = drafter.state_dict()
    for name in sorted(expected.keys() ^ tensors.keys()):
        fault = "is missing" if name in expected else f"is not part of the {kind} that {described_by} describes"
        raise ValueError(f"{folder}: tensor {name!r} (draftsmith's name) {fault}")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            raise ValueError(
                f"{folder}: tensor {name!r} (draftsmith's name) has shape {tuple(tensor.shape)}; {described_by}"
                f" describes {tuple(expected[name].shape)}"
            )
    drafter.load_state_dict(tensors)
