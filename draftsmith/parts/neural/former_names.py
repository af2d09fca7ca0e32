"""Conversion of weights that were saved when modules of a drafter had other names."""

from typing import Any

from torch import nn


def accept_former_names(module: nn.Module, names: dict[str, str]) -> None:
    """Makes `load_state_dict` accept weights saved under former names of children.

    `names` maps former names to current ones. It applies to artifacts and to the checkpoints of training runs.
    """
    module.former_names = names  # type: ignore[assignment]

    def rename(module: nn.Module, tensors: dict[str, Any], prefix: str, *_: Any) -> None:
        for name in [name for name in tensors if name.startswith(prefix)]:
            tensors[f"{prefix}{current_name(module, name.removeprefix(prefix))}"] = tensors.pop(name)

    module.register_load_state_dict_pre_hook(rename)


def current_name(module: nn.Module, name: str) -> str:
    """Returns the current name of a weight of `module`, given that name or a former one."""
    child, dot, rest = name.partition(".")
    return f"{getattr(module, 'former_names', {}).get(child, child)}{dot}{rest}"
