"""Makes an artifact of a published EAGLE-3 head: a folder as the EAGLE repository, SpecForge or speculators write it.

All name the same weights; speculators nest the layer's configuration and call the layer `layers.0`, the others
`midlayer`. Which hidden layers are fused is said in one of two ways: a list at the top counts as ours does, a list in
`eagle_config` counts blocks from 0 and means their outputs, one more in ours.

Shape suffixes: W draft vocabulary.
"""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from data.batches import Batch, Example
from draftsmith import Target
from draftsmith.core.model_info import TargetFacts
from draftsmith.drafters.eagle3 import Config, Drafter
from draftsmith.export.families.eagle3 import LAYER_IDS, NAMES
from draftsmith.length import policies
from trainers import Metrics, Needs, eagle3
from trainers.training.run_settings import RunSettings


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The published head, and the drafts to be made with it."""

    head: str
    """Folder with its config.json and weights."""
    num_draft: int = 5
    """Most tokens drafted one after the other."""
    width: int = 4
    """Of trees that grow where the head is confident; 0 drafts chains."""
    tree_nodes: int = 16
    """Nodes of such a tree."""
    length: str = "fixed"
    """How long chains are, unless told otherwise: a policy of draftsmith/length/policies.py, and its number."""

    def __post_init__(self) -> None:
        for name in ("num_draft", "tree_nodes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.width < 0:
            raise ValueError(f"width is {self.width}; it must not be negative")
        policies.make(self.length)


def check(settings: Settings, target: TargetFacts) -> None:
    """Raises ValueError for a head of another kind or for another target, from its config.json alone."""
    config_of(settings, target)


def needs(settings: Settings, target: Target) -> Needs:
    return Needs(layers=config_of(settings, target).layers)


def evaluate(drafter: Drafter, batch: Batch, settings: Settings, target: Target) -> Metrics:
    return eagle3.step_metrics(drafter, batch, drafter.config.num_draft)


def fit(settings: Settings, target: Target, rows: Sequence[Example], run: RunSettings, output: Path) -> Drafter:
    """Returns the head as a drafter; raises ValueError for tensors that are missing, unknown or of another shape."""
    config = config_of(settings, target)
    found = _renamed(_read_tensors(Path(settings.head)), settings.head)
    embedding = found.get("embedding.weight")
    if embedding is not None and _is_targets(embedding, target):
        del found["embedding.weight"]
        embedding = None
    drafter = Drafter(dataclasses.replace(config, own_embedding=embedding is not None), target)
    _add_vocabulary(found, drafter, settings.head)
    expected = drafter.state_dict()
    for name in sorted(expected.keys() ^ found.keys()):
        what = "is missing" if name in expected else "does not belong to what config.json describes"
        raise ValueError(f"{settings.head}: the weights of {name.removesuffix('.weight')!r}, by our names, {what}")
    for name, tensor in found.items():
        if tensor.shape != expected[name].shape:
            shape, wanted = tuple(tensor.shape), tuple(expected[name].shape)
            raise ValueError(f"{settings.head}: {name!r}, by our names, is {shape} and config.json means {wanted}")
    drafter.load_state_dict(found)
    return drafter.eval()


def config_of(settings: Settings, target: TargetFacts | Target) -> Config:
    """Returns the drafter's configuration; raises ValueError for what differs from an EAGLE-3 head for this target."""
    whole = _read_config(Path(settings.head))
    layer = whole.get("transformer_layer_config", whole)
    missing = {"hidden_size", "intermediate_size", "num_attention_heads", "vocab_size"} - layer.keys()
    if missing:
        raise ValueError(f"{settings.head}/config.json lacks {', '.join(sorted(missing))}")
    wanted: dict[str, Any] = {
        "hidden_size": target.hidden_size,
        "vocab_size": target.vocab_size,
        "num_hidden_layers": 1,
    }
    wanted |= {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
    for key, value in wanted.items():
        if layer.get(key, value) != value:
            raise ValueError(f"{settings.head}: {key} is {layer[key]!r}; for {target.name} it must be {value!r}")
    if (whole.get("target_hidden_size") or target.hidden_size) != target.hidden_size:
        width = whole["target_hidden_size"]
        raise ValueError(f"{settings.head} reads hidden states of width {width}; those of {target.name} differ")
    if layer.get("sliding_window") and layer.get("use_sliding_window", True):
        raise ValueError(f"{settings.head} attends to a sliding window, which is not supported")
    theta, stretch = _rotary(layer, settings.head)
    num_heads = layer["num_attention_heads"]
    draft_vocab = whole.get("draft_vocab_size") or target.vocab_size
    return Config(
        layers=_layers(whole, settings.head, target.num_layers),
        num_heads=num_heads,
        num_kv_heads=layer.get("num_key_value_heads") or num_heads,
        head_width=layer.get("head_dim") or layer["hidden_size"] // num_heads,
        inner_width=layer["intermediate_size"],
        draft_vocab=0 if draft_vocab == target.vocab_size else draft_vocab,
        theta=theta,
        stretch=stretch,
        eps=layer.get("rms_norm_eps", 1e-6),
        fusion_norm="each" if whole.get("fc_norm") else "whole" if whole.get("norm_before_fc") else "none",
        norm_output=bool(whole.get("norm_output")),
        norm_residual=bool(whole.get("norm_before_residual")),
        num_draft=settings.num_draft,
        width=settings.width,
        num_nodes=settings.tree_nodes,
        length=settings.length,
    )


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"{folder} has no config.json; name the folder of a published head")
    try:
        config = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON ({error})") from None
    kind = config.get("speculators_model_type", "eagle3")
    if kind != "eagle3":
        raise ValueError(f"{folder} holds a speculator of type {kind!r}, no EAGLE-3 head")
    if "speculators_model_type" in config and "norm_before_residual" not in config:
        # vLLM then takes it for true, and the speculators library for false.
        raise ValueError(f"{file} does not say norm_before_residual, which its readers take differently; add it")
    return config


def _layers(config: dict[str, Any], head: str, num_layers: int) -> tuple[int, ...]:
    """Returns which hidden layers are fused, in our count."""
    said = {tuple(config[LAYER_IDS])} if config.get(LAYER_IDS) else set()
    if nested := (config.get("eagle_config") or {}).get(LAYER_IDS):
        said.add(tuple(block + 1 for block in nested))
    if len(said) > 1:
        raise ValueError(f"{head}: {LAYER_IDS} names other layers in eagle_config than at the top")
    layers = said.pop() if said else (2, num_layers // 2, num_layers - 3)
    if max(layers) > num_layers:
        raise ValueError(f"{head} reads hidden layers {list(layers)}; the target has {num_layers}")
    return layers


def _rotary(layer: dict[str, Any], head: str) -> tuple[float, tuple[float, ...]]:
    """Returns (theta, stretch) of the rotary positions, as transformers of either kind write them."""
    given = (layer.get("rope_scaling") or {}) | (layer.get("rope_parameters") or {})
    kind = given.get("rope_type", given.get("type", "default"))
    theta = float(given.get("rope_theta") or layer.get("rope_theta") or 10_000.0)
    if kind == "default":
        return theta, ()
    if kind != "llama3":
        raise ValueError(f"{head} has rotary positions of type {kind!r}; default and llama3 are supported")
    keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    return theta, tuple(float(given[key]) for key in keys)


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    """Returns everything in the folder's safetensors files, or in its pytorch_model.bin, read as tensors alone."""
    files = sorted(folder.glob("*.safetensors"))
    pickled = folder / "pytorch_model.bin"
    try:
        if files:
            return {name: tensor for file in files for name, tensor in load_file(file).items()}
        if pickled.is_file():
            return torch.load(pickled, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, OSError) as error:
        raise ValueError(f"the weights in {folder} cannot be read: {error}") from error
    raise ValueError(f"{folder} has neither a safetensors file nor pytorch_model.bin")


def _renamed(tensors: dict[str, Tensor], head: str) -> dict[str, Tensor]:
    found = {}
    for name, tensor in tensors.items():
        inner = name.removesuffix(".weight").removeprefix("midlayer.").removeprefix("layers.0.")
        if name in ("d2t", "t2d"):
            found[name] = tensor.long() if name == "d2t" else tensor.bool()
        elif inner.startswith("fc_norm.") and name.endswith(".weight"):
            found[f"fusion_norms.{inner.removeprefix('fc_norm.')}.weight"] = tensor
        elif inner in NAMES and name.endswith(".weight"):
            found[f"{NAMES[inner]}.weight"] = tensor
        else:
            raise ValueError(f"{head}: tensor {name!r} is no part of an EAGLE-3 head")
    return found


def _is_targets(embedding: Tensor, target: Target) -> bool:
    """Returns whether these are the target's own, whatever precision either was kept in."""
    theirs = target.model.get_input_embeddings().weight
    return embedding.shape == theirs.shape and torch.equal(embedding.bfloat16(), theirs.bfloat16().cpu())


def _add_vocabulary(found: dict[str, Tensor], drafter: Drafter, head: str) -> None:
    """Completes d2t and t2d, or checks that they name the same tokens."""
    num_tokens, vocab_size = len(drafter.d2t), len(drafter.t2d)
    if "d2t" not in found and num_tokens < vocab_size:
        raise ValueError(f"{head}: d2t, which says what its {num_tokens} draft tokens mean, is missing")
    ids_W = found.setdefault("d2t", torch.zeros(num_tokens, dtype=torch.long)) + torch.arange(len(found["d2t"]))
    if (ids_W.diff() <= 0).any() or ids_W.min() < 0 or ids_W.max() >= vocab_size:
        raise ValueError(f"{head}: d2t must lead to ascending tokens below {vocab_size}")
    t2d = torch.zeros(vocab_size, dtype=torch.bool).index_fill(0, ids_W, True)
    if not torch.equal(found.setdefault("t2d", t2d), t2d):
        raise ValueError(f"{head}: d2t and t2d do not name the same tokens")
