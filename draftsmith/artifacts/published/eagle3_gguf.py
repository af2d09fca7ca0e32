"""Reads EAGLE-3 heads in GGUF files, as llama.cpp's converter and draftsmith's export write them.

Hidden layers are numbered as in draftsmith; the draft vocabulary is a list of the target's ids, not of offsets; rows of
queries and keys are interleaved.

Shape suffixes: W draft vocabulary.
"""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from draftsmith.loading.gguf_contents import check_tokens, deinterleave, read_tensors, read_values
from draftsmith.loading.gguf_files import read_header

ARCHITECTURE = "eagle3"
NAMES = {
    "fusion.weight": "fc.weight",
    "fusion_norms.0.weight": "enc.output_norm.weight",
    "token_norm.weight": "blk.0.attn_norm.weight",
    "feature_norm.weight": "blk.0.attn_norm_2.weight",
    "attention.query.weight": "blk.0.attn_q.weight",
    "attention.key.weight": "blk.0.attn_k.weight",
    "attention.value.weight": "blk.0.attn_v.weight",
    "attention.output.weight": "blk.0.attn_output.weight",
    "feed_forward_norm.weight": "blk.0.ffn_norm.weight",
    "feed_forward.gate.weight": "blk.0.ffn_gate.weight",
    "feed_forward.up.weight": "blk.0.ffn_up.weight",
    "feed_forward.down.weight": "blk.0.ffn_down.weight",
    "norm.weight": "output_norm.weight",
    "head.weight": "output.weight",
    "embedding.weight": "token_embd.weight",
}
"""The drafter's names of weights, and llama.cpp's."""
REQUIRED = (
    "embedding_length",
    "feed_forward_length",
    "attention.head_count",
    "attention.layer_norm_rms_epsilon",
    "target_layers",
    "target_hidden_size",
)
D2T, ROPE_FREQS = "d2t", "rope_freqs.weight"


def read_shape(path: Path, target: Any) -> dict[str, Any]:
    """Returns the values of the drafter's configuration that the file determines.

    `target` gives name, tokenizer, hidden_size, vocab_size and num_layers. Raises ValueError for anything but an
    EAGLE-3 head for this target.
    """
    architecture = read_header(path).architecture
    if architecture != ARCHITECTURE:
        raise ValueError(
            f"{path} holds a model of architecture {architecture!r}; an EAGLE-3 head has {ARCHITECTURE!r}"
            + ("; a draft model is imported with ./launch.sh distill --init FILE" if architecture == "llama" else "")
        )
    values = read_values(path)
    found = {key.removeprefix(f"{ARCHITECTURE}."): value.value for key, value in values.items()}
    if missing := [key for key in REQUIRED if key not in found]:
        raise ValueError(f"{path} lacks {ARCHITECTURE}.{missing[0]}; convert the head again")
    for key in ("target_hidden_size", "embedding_length"):
        if found[key] != target.hidden_size:
            raise ValueError(
                f"{path}: {ARCHITECTURE}.{key} is {found[key]}, and target {target.name} has a hidden size of"
                f" {target.hidden_size}; it is a head for another target"
            )
    if found.get("block_count", 1) != 1:
        raise ValueError(f"{path} has {found['block_count']} blocks; draftsmith's EAGLE-3 heads have one")
    check_tokens(values, path, target)
    layers = tuple(int(layer) for layer in found["target_layers"])
    if max(layers) > target.num_layers:
        raise ValueError(f"{path} reads hidden layers {list(layers)}, and target {target.name} has {target.num_layers}")
    tensors = read_tensors(path)
    num_heads = found["attention.head_count"]
    head_width = found.get("attention.key_length") or found["embedding_length"] // num_heads
    theta = float(found.get("rope.freq_base", 10_000.0))
    num_tokens = len(tensors[D2T]) if D2T in tensors else target.vocab_size
    return {
        "layers": layers,
        "num_heads": num_heads,
        "num_kv_heads": found.get("attention.head_count_kv") or num_heads,
        "head_width": head_width,
        "inner_width": found["feed_forward_length"],
        "draft_vocab": 0 if num_tokens == target.vocab_size else num_tokens,
        "theta": theta,
        "stretch": _stretch(tensors.get(ROPE_FREQS), head_width, theta, path),
        "eps": found["attention.layer_norm_rms_epsilon"],
        "fusion_norm": "whole" if found.get("norm_before_fc") else "none",
        "norm_residual": bool(found.get("norm_before_residual")),
    }


def read_weights(path: Path, target: Any) -> dict[str, Tensor]:
    """Returns the head's tensors by the drafter's names; raises ValueError for a tensor that no EAGLE-3 head has.

    A head without an LM head of its own is given a copy of the target's.
    """
    ours = {new: name for name, new in NAMES.items()}
    tensors = {}
    for name, tensor in read_tensors(path).items():
        if name == D2T:
            ids_W = tensor.long()
            tensors["d2t"] = ids_W - torch.arange(len(ids_W))
        elif name in ours:
            tensors[ours[name]] = tensor
        elif name != ROPE_FREQS:
            raise ValueError(f"{path}: tensor {name!r} is not part of an EAGLE-3 head")
    counts = {key: value.value for key, value in read_values(path, f"{ARCHITECTURE}.attention.").items()}
    num_heads = counts[f"{ARCHITECTURE}.attention.head_count"]
    num_kv_heads = counts.get(f"{ARCHITECTURE}.attention.head_count_kv") or num_heads
    for name, number in (("attention.query", num_heads), ("attention.key", num_kv_heads)):
        if (weight := tensors.get(f"{name}.weight")) is not None and len(weight) % (2 * number) == 0:
            tensors[f"{name}.weight"] = deinterleave(weight, number)
    tensors.setdefault("head.weight", target.model.get_output_embeddings().weight.detach().float().cpu())
    return tensors


def _stretch(divisors: Tensor | None, head_width: int, theta: float, path: Path) -> tuple[float, ...]:
    """Returns Llama 3.1's scaling (factor, low, high, length) of which the divisors of the frequencies are.

    `factor` is the largest divisor; the share s of a wave in between is linear in its turns, so that two waves give
    `low` and `high` for the usual length, 8192. Raises ValueError for divisors of another kind.
    """
    if divisors is None or (divisors == 1).all():
        return ()
    length = 8192.0
    divisors = divisors.double()
    factor = float(divisors.max())
    turns = length * theta ** -(torch.arange(0, head_width, 2, dtype=torch.float64) / head_width) / (2 * math.pi)
    share = (1 / divisors - 1 / factor) / (1 - 1 / factor)
    between = ((share > 1e-4) & (share < 1 - 1e-4)).nonzero()[:, 0]
    low, high = 1.0, 4.0
    if len(between) >= 2:
        first, last = between[0], between[-1]
        slope = float((share[first] - share[last]) / (turns[first] - turns[last]))
        low = float(turns[last] - share[last] / slope)
        high = low + 1 / slope
    expected = ((turns - low) / (high - low)).clamp(0, 1)
    if not torch.allclose(share, expected, atol=1e-3):
        raise ValueError(f"{path}: the divisors of its rotary frequencies are not Llama 3.1's scaling")
    return factor, low, high, length
