"""Medusa heads for vLLM, of which 0.32.0 is the last version that runs them.

Shape suffixes: V vocabulary, D hidden width.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from draftsmith.export.given import Given
from draftsmith.export.launch import Launch, check_path, for_vllm
from draftsmith.export.tensors import Kinds, write_tensors

LAST = "vLLM 0.32.0, the last that runs Medusa"


def vllm(given: Given, folder: Path) -> Launch:
    """Writes the heads; those that use the target's head get a copy of it, which vLLM does not take from the target."""
    check_path(given)
    drafter, config = given.drafter, given.config
    output = drafter.target.model.get_output_embeddings()
    if not config.own_head and getattr(output, "bias", None) is not None:
        raise ValueError("the target's head has a bias, which vLLM's Medusa heads have not; train with --own-head")
    whole = {
        "model_type": "medusa",
        "architectures": ["MedusaModel"],
        "hidden_size": given.facts.hidden_size,
        "vocab_size": given.facts.vocab_size,
        "truncated_vocab_size": given.facts.vocab_size,
        "num_heads": config.num_heads,
        "num_hidden_layers": config.num_blocks,
        # Without it the biases would be left out, and nothing said.
        "medusa_fc_bias": True,
        "original_lm_head": not config.own_head,
        "logit_scale": 1.0,
        "dtype": str(drafter.target.dtype).removeprefix("torch."),
    }
    write_tensors(folder, tensors_of(given), kinds(whole, drafter.target.dtype))
    (folder / "config.json").write_text(json.dumps(whole, indent=1) + "\n")
    settings = {"method": "medusa", "model": str(given.output), "num_speculative_tokens": config.num_heads}
    return for_vllm(
        given,
        settings,
        checked_with=LAST,
        notes=(
            "vLLM 0.33.0 and later run no Medusa heads: install vllm<=0.32.0.",
            "vLLM drafts the first guess of each head, a chain; the tree stays behind.",
        ),
    )


def tensors_of(given: Given) -> dict[str, Tensor]:
    """Returns the heads' weights by vLLM's names."""
    drafter, tensors = given.drafter, {}
    for head, blocks in enumerate(drafter.blocks):
        for number, linear in enumerate(blocks):
            tensors[f"blocks.{head}.layers.{number}.weight"] = linear.weight
            tensors[f"blocks.{head}.layers.{number}.bias"] = linear.bias
    if not given.config.own_head:
        return tensors | {"lm_head.weight": drafter.target.model.get_output_embeddings().weight}
    return tensors | {f"lm_heads.{head}.weight": output.weight for head, output in enumerate(drafter.outputs)}


def kinds(whole: dict[str, Any], dtype: torch.dtype) -> Kinds:
    """Returns the tensors that vLLM wants of heads with such a config.json, worked out from that alone."""
    width, vocab_size, num_heads = whole["hidden_size"], whole["vocab_size"], whole["num_heads"]
    found: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for head in range(num_heads):
        for number in range(whole["num_hidden_layers"]):
            found[f"blocks.{head}.layers.{number}.weight"] = ((width, width), dtype)
            if whole["medusa_fc_bias"]:
                found[f"blocks.{head}.layers.{number}.bias"] = ((width,), dtype)
    if whole["original_lm_head"]:
        return found | {"lm_head.weight": ((vocab_size, width), dtype)}
    return found | {f"lm_heads.{head}.weight": ((vocab_size, width), dtype) for head in range(num_heads)}


WRITERS = {"vllm": vllm}
