"""Conversion of weights that were saved when modules of a drafter had other names."""

from typing import Any

from torch import nn


def accept_former_names(module: nn.Module, names: dict[str, str]) -> None:
    """Makes `load_state_dict` accept weights saved under the former names of children; `names` maps these to today's.

    It applies to artifacts and to the checkpoints of training runs.
    """

    def rename(module: nn.Module, tensors: dict[str, Any], prefix: str, *_: Any) -> None:
        for name in list(tensors):
            child, dot, rest = name.removeprefix(prefix).partition(".")
            if name.startswith(prefix) and dot and child in names:
                tensors[f"{prefix}{names[child]}.{rest}"] = tensors.pop(name)

    module.register_load_state_dict_pre_hook(rename)
