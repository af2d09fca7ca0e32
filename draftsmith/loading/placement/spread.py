"""Models spread over devices: over those of one process by `device_map`, over those of all ranks by tensor parallelism.

Under tensor parallelism every rank must run the target on the same tokens at the same time. The embedding and the head
are whole on every rank, so that drafters use them as those of any model.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from draftsmith.loading.text_files import parse_yaml

DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")


def check_spread(device_map: Any, *, tensor_parallel: bool) -> None:
    """Raises ValueError for a spread that is none, or that this process cannot take part in."""
    if device_map and tensor_parallel:
        raise ValueError("--device-map and --tensor-parallel cannot be combined; give one of them")
    if device_map and not isinstance(device_map, dict):
        if device_map not in DEVICE_MAPS:
            _read_map(device_map)
        elif (num_ranks := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
            raise ValueError(
                f"--device-map {device_map} takes all devices, and there are {num_ranks} processes; start one, or take"
                " --tensor-parallel"
            )
    if tensor_parallel and int(os.environ.get("WORLD_SIZE", "1")) < 2:
        raise ValueError(
            "--tensor-parallel spreads the target over the processes of one run, and there is one process; start"
            " several: ./launch.sh RECIPE --nproc N, or torchrun"
        )


def loading_options(auto: Any, config: Any, device_map: Any, *, tensor_parallel: bool) -> dict[str, Any]:
    """Returns the arguments of `from_pretrained` that spread a model; none for a model on one device.

    Raises ValueError for a model that cannot be spread so.
    """
    check_spread(device_map, tensor_parallel=tensor_parallel)
    if device_map:
        is_named = isinstance(device_map, dict) or device_map in DEVICE_MAPS
        return {"device_map": device_map if is_named else _read_map(device_map)}
    if not tensor_parallel:
        return {}
    from transformers.distributed import DistributedConfig  # older versions of transformers have none

    num_ranks, text = int(os.environ["WORLD_SIZE"]), config.get_text_config(decoder=True)
    name = (config.architectures or [config.model_type])[0]
    for what in ("num_attention_heads", "num_key_value_heads"):
        number = getattr(text, what, None)
        if isinstance(number, int) and number % num_ranks:
            raise ValueError(
                f"{name} has {what} {number}, which {num_ranks} processes cannot share; take a number that divides it"
            )
    with torch.device("meta"):
        model = auto.from_config(config)
    if not (plan := getattr(model, "tp_plan", None)):
        raise ValueError(f"{name} has no plan for tensor parallelism in transformers; use --device-map instead")
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    whole = [name for name, part in model.named_modules() if any(part is end for end in ends)]
    kept = {key: "replicate" for key in plan if any(key in (one, f"{one}.weight", f"{one}.bias") for one in whole)}
    return {"distributed_config": DistributedConfig(tp_size=num_ranks, tp_plan=kept or "auto")}


def spread_of(model: Any) -> str:
    """Returns how a model is spread: "device_map", "tensor parallelism", or nothing."""
    if (getattr(model, "tp_size", None) or 1) > 1:
        return "tensor parallelism"
    return "device_map" if len({*(getattr(model, "hf_device_map", None) or {}).values()}) > 1 else ""


def input_device(model: Any) -> torch.device | None:
    """Returns the device that a model spread by `device_map` takes its tokens on; None for any other."""
    if spread_of(model) != "device_map":
        return None
    embedding = model.get_input_embeddings()
    hook = getattr(embedding, "_hf_hook", None)
    device = getattr(hook, "execution_device", None)
    return torch.device(device) if device is not None else embedding.weight.device


def whole_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yields every parameter by name, in order, as it is in the model's files: joined, or read from where it is kept.

    Under tensor parallelism every rank must call it.
    """
    for name, weight in sorted(model.named_parameters()):
        if hasattr(weight, "full_tensor"):
            yield name, weight.detach().full_tensor()  # type: ignore[attr-defined]
        elif weight.is_meta:
            module, _, own = name.rpartition(".")
            hook: Any = getattr(model.get_submodule(module), "_hf_hook", None)
            hooks = getattr(hook, "hooks", [hook])
            weights = next((one.weights_map for one in hooks if getattr(one, "weights_map", None) is not None), None)
            if weights is None:
                raise ValueError(f"the weights of {module} are on no device; load the model with its weights")
            yield name, weights[own]
        else:
            yield name, weight.detach()


def _read_map(text: str) -> dict[str, Any]:
    """Returns the map of modules to devices that `text` is, or that is in the file of that name."""
    is_file = Path(text).is_file()
    try:
        found = parse_yaml(Path(text).read_text(encoding="utf-8") if is_file else text)
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict) or not found:
        raise ValueError(
            f"--device-map is {text!r:.80}; expected {', '.join(DEVICE_MAPS)}, a mapping of modules to devices as in"
            " {model.layers.0: 0, model.layers.1: cpu}, or a file with one"
        )
    return found
