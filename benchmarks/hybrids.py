"""The price of taking back recurrent state: a drafted step of a hybrid against a plain one, whole and partly accepted.

    .venv/bin/python benchmarks/hybrids.py

A random Qwen3-Next of 8 layers, 6 of them with linear attention. The steps take turns in one process; each figure is
the median of their CPU time, which other work on the machine changes little. After a partly accepted draft the next
step's forward feeds the recurrent modules the accepted tokens again, before its own; after a whole one it need not.
"""

import statistics
import time
from dataclasses import dataclass

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from draftsmith import Target
from draftsmith.core.tree import chain
from draftsmith.length.costs import num_threads
from eval import hardware
from trainers.training.settings import parse_settings


@dataclass(frozen=True, kw_only=True)
class BenchmarkSettings:
    """The model's size and the drafts."""

    model_type: str = "qwen3_next"
    """An architecture with recurrent layers."""
    hidden_size: int = 512
    """Width of the hidden states."""
    num_draft: int = 4
    """Drafted tokens of a step."""
    num_accepted: int = 2
    """Accepted ones of a draft that is accepted in part."""
    repeats: int = 20
    """Steps of each kind."""


def made(run: BenchmarkSettings) -> Target:
    """Returns the random model as a target."""
    config = AutoConfig.for_model(
        run.model_type,
        vocab_size=8_192,
        hidden_size=run.hidden_size,
        intermediate_size=3 * run.hidden_size,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        linear_num_key_heads=8,
        linear_num_value_heads=16,
        linear_key_head_dim=64,
        linear_value_head_dim=64,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=run.hidden_size,
        shared_expert_intermediate_size=run.hidden_size,
    )
    torch.manual_seed(0)
    return Target(AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval())


@torch.inference_mode()
def main(run: BenchmarkSettings) -> None:
    target, size = made(run), run.num_draft + 1
    kinds = {"plain": (1, 1), "drafted, accepted whole": (size, size), "drafted, in part": (size, run.num_accepted + 1)}
    caches = {kind: target.new_cache(1) for kind in kinds}
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    with num_threads(1):
        for cache in caches.values():
            target.prefill([[5] * 64], cache)
        for _ in range(run.repeats):
            for kind, (num_fed, num_kept) in kinds.items():
                tokens_1N = torch.full((1, num_fed), 7)
                began = time.process_time()
                target.logits(target.forward(tokens_1N, chain(num_fed), caches[kind]).hidden_BND)
                caches[kind].commit([list(range(num_kept))])
                times[kind].append(time.process_time() - began)
    medians = {kind: 1e3 * statistics.median(found) for kind, found in times.items()}
    size_m = sum(weight.numel() for weight in target.model.parameters()) / 1e6
    print(f"{run.model_type}, {size_m:.0f} M parameters, {run.num_draft} drafted; {hardware.describe(target.device)}")
    for kind, median in medians.items():
        print(f"{kind:<24} {median:7.2f} ms of CPU time, {median / medians['plain']:.2f} plain steps")


if __name__ == "__main__":
    main(*parse_settings(BenchmarkSettings, description=__doc__))
