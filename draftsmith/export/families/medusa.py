"""Exports Medusa heads for vLLM, whose last version to support them is 0.32.0.

Shape suffixes: V vocabulary, D hidden width.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from draftsmith.artifacts import json_text
from draftsmith.export.launch import Launch, check_path, vllm_launch
from draftsmith.export.source import ExportSource
from draftsmith.export.tensors import Specs, write_tensors

CHECKED_WITH = "vLLM 0.32.0, the last version that supports Medusa"


def vllm(source: ExportSource, folder: Path) -> Launch:
    """Writes the heads, with a copy of the target's LM head if they use it, since vLLM does not share the target's."""
    check_path(source)
    drafter, config = source.drafter, source.config
    output = drafter.target.model.get_output_embeddings()
    if not config.own_head and getattr(output, "bias", None) is not None:
        raise ValueError("the target's LM head has a bias, unlike vLLM's Medusa heads; train with --own-head")
    config_json = {
        "model_type": "medusa",
        "architectures": ["MedusaModel"],
        "hidden_size": source.target_info.hidden_size,
        "vocab_size": source.target_info.vocab_size,
        "truncated_vocab_size": source.target_info.vocab_size,
        "num_heads": config.num_heads,
        "num_hidden_layers": config.num_blocks,
        # Without it vLLM would silently ignore the biases.
        "medusa_fc_bias": True,
        "original_lm_head": not config.own_head,
        "logit_scale": 1.0,
        "dtype": str(drafter.target.dtype).removeprefix("torch."),
    }
    write_tensors(folder, tensors_of(source), tensor_specs(config_json, drafter.target.dtype))
    (folder / "config.json").write_text(json_text.text_of(config_json, indent=1) + "\n")
    settings = {"method": "medusa", "model": str(source.output), "num_speculative_tokens": config.num_heads}
    return vllm_launch(
        source,
        settings,
        checked_with=CHECKED_WITH,
        notes=(
            "vLLM 0.33.0 and later do not support Medusa heads: install vllm<=0.32.0.",
            "vLLM drafts a chain of each head's most likely token at every temperature, whereas draftsmith drafts a"
            " tree.",
        ),
    )


def tensors_of(source: ExportSource) -> dict[str, Tensor]:
    """Returns the heads' weights under vLLM's names."""
    drafter, tensors = source.drafter, {}
    for head, blocks in enumerate(drafter.blocks):
        for number, linear in enumerate(blocks):
            tensors[f"blocks.{head}.layers.{number}.weight"] = linear.weight
            tensors[f"blocks.{head}.layers.{number}.bias"] = linear.bias
    if not source.config.own_head:
        return tensors | {"lm_head.weight": drafter.target.model.get_output_embeddings().weight}
    return tensors | {f"lm_heads.{head}.weight": output.weight for head, output in enumerate(drafter.outputs)}


def tensor_specs(config_json: dict[str, Any], dtype: torch.dtype) -> Specs:
    """Returns the tensors that vLLM expects for heads with this config.json, derived from that alone."""
    width, vocab_size, num_heads = config_json["hidden_size"], config_json["vocab_size"], config_json["num_heads"]
    specs: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for head in range(num_heads):
        for number in range(config_json["num_hidden_layers"]):
            specs[f"blocks.{head}.layers.{number}.weight"] = ((width, width), dtype)
            if config_json["medusa_fc_bias"]:
                specs[f"blocks.{head}.layers.{number}.bias"] = ((width,), dtype)
    if config_json["original_lm_head"]:
        return specs | {"lm_head.weight": ((vocab_size, width), dtype)}
    return specs | {f"lm_heads.{head}.weight": ((vocab_size, width), dtype) for head in range(num_heads)}


WRITERS = {"vllm": vllm}
