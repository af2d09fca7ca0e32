"""Quantisation of linear layers by torchao, which only this module needs and imports when it is used."""

import importlib.util
import math
from typing import Any

import torch
from torch import nn

from draftsmith.core.views import blocks_of

SCHEMES = ("int8", "int8_dynamic", "int4")
"""Weights only; weights and dynamically quantised activations, per token; weights only, in groups."""
GROUP = 32
"""Neighbouring inputs that share a scale in int4, or the largest divisor of this that divides every layer's width."""


def check(scheme: str) -> None:
    """Raises ValueError for an unknown scheme, or if torchao is not installed."""
    if scheme not in SCHEMES:
        raise ValueError(f"quantised is {scheme!r}; it must be one of {', '.join(SCHEMES)}")
    if importlib.util.find_spec("torchao") is None:
        raise ValueError(f"{scheme} needs torchao, which is not installed: pip install torchao==0.18.0")


def config_of(model: nn.Module, scheme: str) -> Any:
    """Returns torchao's configuration of a scheme.

    torchao 0.18 packs two 4-bit values into a byte for CUDA and XPU only: these int4 weights take a byte each, which
    runs anywhere.
    """
    from torchao import quantization

    if scheme == "int8":
        return quantization.Int8WeightOnlyConfig()
    if scheme == "int8_dynamic":
        return quantization.Int8DynamicActivationInt8WeightConfig()
    assert scheme == "int4"
    widths = [one.in_features for one in blocks_of(model).modules() if isinstance(one, nn.Linear)]
    groups = quantization.PerGroup(math.gcd(GROUP, *widths))
    return quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=groups)  # type: ignore[attr-defined]


def quantise(model: nn.Module, scheme: str) -> None:
    """Quantises the linear layers of a model's blocks in place; embedding and LM head keep their precision."""
    from torchao.quantization import quantize_

    quantize_(blocks_of(model), config_of(model, scheme))
