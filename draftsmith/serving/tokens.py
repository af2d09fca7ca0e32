"""A target that runs in another engine, as token-only drafters see it: `TokenTarget`.

Shape suffixes: V vocabulary, D hidden width.
"""

from functools import cached_property
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import cached_file

from draftsmith.artifacts import json_text
from draftsmith.artifacts.files import inside, plain_name
from draftsmith.loading import remote_code
from draftsmith.loading.model_info import read_target_info
from draftsmith.loading.target_names import model_folder

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


class TokenTarget:
    """The description of a target, given by folder or hub name, that runs in another engine and verifies chains.

    Of its weights only the embedding and the LM head are read, 2 V D numbers or V D if they are tied, and only for a
    drafter that uses them. Raises ValueError for an encoder-decoder.
    """

    is_encoder_decoder = False
    takes_trees = False
    is_run_whole = False
    fingerprint = None
    """None, because computing it would require all weights."""
    pack_weights: bool | None = None
    """As `Target.pack_weights`: drafters' weights are packed on CPUs unless they take too much memory."""

    def __init__(self, path: str, dtype: torch.dtype, device: torch.device) -> None:
        target_info = read_target_info(path)
        if target_info.is_encoder_decoder:
            raise ValueError(f"target {path} is an encoder-decoder; its drafters run in draftsmith only")
        self.name, self.tokenizer_hash = target_info.name, target_info.tokenizer_hash
        self.vocab_size, self.context_length = target_info.vocab_size, target_info.context_length
        self.num_layers, self.hidden_size = target_info.num_layers, target_info.hidden_size
        self.dtype, self.device = dtype, device

    @cached_property
    def model(self) -> "EmbeddingAndHead":
        """The embedding and the LM head, read on first use."""
        return EmbeddingAndHead(model_folder(self.name), self.dtype, self.device)


class EmbeddingAndHead:
    """The embedding and the LM head [V, D] of a model; raises ValueError if its safetensors files lack them."""

    def __init__(self, path: str, dtype: torch.dtype, device: torch.device) -> None:
        trusted = remote_code.is_allowed()
        config = AutoConfig.from_pretrained(path, trust_remote_code=trusted)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trusted)
        model.tie_weights()
        self._layers: list[nn.Module] = []
        tensors: dict[str, Tensor] = {}
        for meta_layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            layer = nn.Module()
            for kind, parameter in meta_layer.named_parameters():
                # Tied weights are stored under the name of the first.
                name = next(name for name, other in model.named_parameters() if other is parameter)
                if name not in tensors:
                    tensors[name] = _read_tensor(path, name, tuple(parameter.shape)).to(device, dtype)
                layer.register_parameter(kind, nn.Parameter(tensors[name], requires_grad=False))
            self._layers.append(layer)

    def get_input_embeddings(self) -> nn.Module:
        return self._layers[0]

    def get_output_embeddings(self) -> nn.Module:
        return self._layers[1]


def _read_tensor(path: str, name: str, shape: tuple[int, ...]) -> Tensor:
    """Returns one tensor of a model's safetensors files."""
    weights = _find_file(path, WEIGHTS)
    if weights is None:
        index = _find_file(path, INDEX)
        shards: dict[str, Any] = json_text.read(index)["weight_map"] if index else {}
        weights = _find_file(path, plain_name(shards[name], f"target {path}: {INDEX}")) if name in shards else None
    try:
        if weights is None:
            raise ValueError("no safetensors file contains it")
        with safetensors.safe_open(weights, framework="pt") as file:
            tensor = file.get_tensor(name)
        if tuple(tensor.shape) != shape:
            raise ValueError(f"its shape is {tuple(tensor.shape)}, expected {shape}")
    except (safetensors.SafetensorError, ValueError) as error:
        raise ValueError(f"target {path}: tensor {name!r}, which this drafter needs, cannot be read: {error}") from None
    return tensor


def _find_file(path: str, name: str) -> Path | None:
    """Returns the path of a model's file, None if the model has no such file."""
    try:
        found = cached_file(path, name, _raise_exceptions_for_missing_entries=False)
    except OSError as error:
        raise ValueError(f"target {path}: {name} cannot be read: {' '.join(str(error).split())}") from None
    # A hub repository's files are checked by huggingface_hub.
    return None if found is None else inside(Path(path), name) if Path(path).is_dir() else Path(found)
