"""A target of which only the tokens are known: what a drafter needs that goes by them alone, in an engine of its own.

Shape suffixes: V vocabulary, D width.
"""

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import cached_file

from draftsmith.core.model_info import read_facts

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


class TokenTarget:
    """A transformers folder or hub name as a target that runs elsewhere, and verifies chains.

    Of its weights the embedding and the output matrix are read, 2 V D numbers or half of them where they are tied, and
    only for a drafter that asks for them. Raises ValueError for an encoder-decoder.
    """

    is_encoder_decoder = False
    takes_trees = False
    fingerprint = None
    """Only the weights tell."""

    def __init__(self, path: str, dtype: torch.dtype, device: torch.device) -> None:
        facts = read_facts(path)
        if facts.is_encoder_decoder:
            raise ValueError(f"target {path} is an encoder-decoder, whose drafters run in draftsmith alone")
        self.name, self.tokenizer_hash = facts.name, facts.tokenizer_hash
        self.vocab_size, self.context_length = facts.vocab_size, facts.context_length
        self.num_layers, self.hidden_size = facts.num_layers, facts.hidden_size
        self.dtype, self.device = dtype, device

    @cached_property
    def model(self) -> "Ends":
        """The embedding and the output matrix."""
        return Ends(self.name, self.dtype, self.device)


class Ends:
    """The first and the last matrix [V, D] of a model; raises ValueError if its files do not hold them by its names."""

    def __init__(self, path: str, dtype: torch.dtype, device: torch.device) -> None:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))
        model.tie_weights()
        self._ends: list[nn.Module] = []
        read: dict[str, Tensor] = {}
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            end = nn.Module()
            for kind, parameter in layer.named_parameters():
                # One that is tied has the name of the first.
                name = next(name for name, other in model.named_parameters() if other is parameter)
                if name not in read:
                    read[name] = _read(path, name, tuple(parameter.shape)).to(device, dtype)
                end.register_parameter(kind, nn.Parameter(read[name], requires_grad=False))
            self._ends.append(end)

    def get_input_embeddings(self) -> nn.Module:
        return self._ends[0]

    def get_output_embeddings(self) -> nn.Module:
        return self._ends[1]


def _read(path: str, name: str, shape: tuple[int, ...]) -> Tensor:
    """Returns one tensor of a model's safetensors files."""
    whole = _file(path, WEIGHTS)
    if whole is None:
        index = _file(path, INDEX)
        parts: dict[str, Any] = json.loads(index.read_text())["weight_map"] if index else {}
        whole = _file(path, parts[name]) if name in parts else None
    try:
        if whole is None:
            raise ValueError("no safetensors file has it")
        with safetensors.safe_open(whole, framework="pt") as file:
            tensor = file.get_tensor(name)
        if tuple(tensor.shape) != shape:
            raise ValueError(f"it is {tuple(tensor.shape)} there, not {shape}")
    except (safetensors.SafetensorError, ValueError) as error:
        raise ValueError(f"target {path}: tensor {name!r}, which this drafter needs, cannot be read: {error}") from None
    return tensor


def _file(path: str, name: str) -> Path | None:
    try:
        found = cached_file(path, name, _raise_exceptions_for_missing_entries=False)
    except OSError as error:
        raise ValueError(f"target {path}: {name} cannot be had: {' '.join(str(error).split())}") from None
    return None if found is None else Path(found)
