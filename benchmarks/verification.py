"""Measures verification: of chains against transformers' own, and of trees in passes over the vocabulary.

    .venv/bin/python benchmarks/verification.py

One core of an AMD EPYC, 128,000 tokens, process CPU time: on a chain of 8, token verification is 1.2 to 1.9 times as
fast as transformers', block 1.1 to 1.65, traversal 1.2. Trees of 64 nodes, batch 8, in passes per accepted level:
recursive rejection 3 to 4, traversal 5 to 6 (it also tests nodes that it rejects on the way), deterministic 6, most of
it for allocating memory at its only level, K-SEQ 14 (it searches for rho), multi-path 28 (it grades every token).
"""

import itertools
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers.generation.utils import _speculative_sampling

from draftsmith.core.sampling import Sampling
from draftsmith.core.tree import Draft, SamplingScheme, Tree, chain
from draftsmith.length.costs import num_threads
from draftsmith.verify import block, deterministic, traversal
from draftsmith.verify.research import kseq, multipath, recursive, token
from eval import hardware
from trainers.training.settings import parse_settings


@dataclass(frozen=True, kw_only=True)
class BenchmarkSettings:
    """Sizes, and number of measurements."""

    vocab_size: int = 128_000
    """Size of the vocabulary."""
    num_drafted: int = 8
    """Length of the chain."""
    num_nodes: int = 64
    """Drafted nodes of the tree: four children per node, three levels, cut to this number."""
    batch_size: int = 8
    """Rows of the tree."""
    rounds: int = 15
    """Number of measurements of each, made in turn."""
    threads: int = 1
    """CPU threads; 0 keeps torch's default."""
    seed: int = 0
    """Seed of distributions, drafts and uniforms."""


def main(run: BenchmarkSettings) -> None:
    torch.manual_seed(run.seed)
    with num_threads(run.threads), torch.inference_mode():
        machine = hardware.describe(torch.device("cpu"))
        print(f"{machine}, {torch.get_num_threads()} thread(s), vocabulary {run.vocab_size:,}")
        chains(run)
        trees(run)


def chains(run: BenchmarkSettings) -> None:
    """Prints the time of each verifier for one chain, including both softmaxes, next to transformers'."""
    draft_logits = 4 * torch.randn(1, run.num_drafted, run.vocab_size)
    target_logits = torch.nn.functional.pad(draft_logits, (0, 0, 0, 1)) + torch.randn(1, 1, run.vocab_size)
    drafted_BN = torch.multinomial(draft_logits[0].softmax(-1), 1)[:, 0][None]
    tree, sampling = chain(run.num_drafted + 1), Sampling(temperature=1.0)

    def verification(verify: Callable[..., object]) -> Callable[[], object]:
        def work() -> object:
            draft = Draft(
                tokens_BN=torch.nn.functional.pad(drafted_BN, (1, 0)),
                tree=tree,
                draft_probs_BNV=sampling.probs(draft_logits),
                sampling_scheme="independent",
            )
            return verify(sampling.probs(target_logits), draft, torch.rand(1, run.num_drafted + 2, dtype=torch.float64))

        return work

    works = {
        "transformers": lambda: _speculative_sampling(drafted_BN, draft_logits, run.num_drafted, target_logits),
        "token": verification(token.verify),
        "block": verification(block.verify),
        "traversal": verification(traversal.verify),
    }
    found = time_in_turn(works, run.rounds)
    print(f"a chain of {run.num_drafted}, batch 1")
    for name, times in found.items():
        ratio = statistics.median(theirs / ours for ours, theirs in zip(times, found["transformers"], strict=True))
        print(f"  {name:13} {statistics.median(times):7.2f} ms, {ratio:.2f} times as fast as transformers")


def trees(run: BenchmarkSettings) -> None:
    """Prints the time of each verifier for a batch of trees, in passes over [batch, vocabulary] per accepted level."""
    parents = [-1] + [node // 4 for node in range(run.num_nodes)]
    tree, shape = Tree.from_parents([parents]), (run.batch_size, run.num_nodes + 1, run.vocab_size)
    draft_BNV = (4 * torch.randn(shape)).softmax(-1)
    target_BNV = (draft_BNV.log() + torch.randn(shape)).softmax(-1)
    uniforms_BU = torch.rand(run.batch_size, run.num_nodes + 2, dtype=torch.float64)
    nodes, memory_BV = itertools.cycle(range(run.num_nodes)), torch.empty_like(target_BNV[:, 0])
    verifiers = {
        "deterministic": deterministic,
        "recursive": recursive,
        "traversal": traversal,
        "kseq": kseq,
        "multipath": multipath,
    }
    drafts: dict[str, Draft] = {}
    schemes: tuple[SamplingScheme, ...] = ("independent", "without_replacement")
    for scheme in schemes:
        tokens_BN = sample_tokens(draft_BNV, parents, with_replacement=scheme == "independent")
        drafts[scheme] = Draft(tokens_BN=tokens_BN, tree=tree, draft_probs_BNV=draft_BNV, sampling_scheme=scheme)
    drafts["deterministic"] = Draft(tokens_BN=drafts["without_replacement"].tokens_BN, tree=tree)
    cases = {
        f"{name} ({scheme.replace('_', ' ')})": (verifier, drafts[scheme])
        for name, verifier in verifiers.items()
        for scheme in verifier.SCHEMES
    }
    works: dict[str, Callable[[], object]] = {
        name: lambda verifier=verifier, draft=draft: verifier.verify(target_BNV, draft, uniforms_BU)  # type: ignore[misc]
        for name, (verifier, draft) in cases.items()
    }
    # Two distributions that are in no CPU cache, into allocated memory.
    works["one pass"] = lambda: torch.sub(target_BNV[:, (node := next(nodes))], draft_BNV[:, node], out=memory_BV)
    found = time_in_turn(works, run.rounds)
    pass_ms = statistics.median(found.pop("one pass"))
    print(
        f"a tree of {run.num_nodes}, batch {run.batch_size}; one pass, a difference of two distributions:"
        f" {pass_ms:.2f} ms"
    )
    for name, times in found.items():
        verifier, draft = cases[name]
        levels = 1 + int(verifier.verify(target_BNV, draft, uniforms_BU).num_accepted_B.max())
        median = statistics.median(times)
        print(f"  {name:33} {median:7.1f} ms, {median / pass_ms / levels:5.1f} passes per level, {levels} levels")


def sample_tokens(probs_BNV: Tensor, parents: list[int], *, with_replacement: bool) -> Tensor:
    """Returns tokens [B, N] sampled from their parents' distributions, siblings with or without replacement."""
    tokens_BN = torch.zeros(probs_BNV.shape[:2], dtype=torch.long)
    for parent in sorted(set(parents[1:])):
        children = [node for node, above in enumerate(parents) if above == parent]
        tokens_BN[:, children] = torch.multinomial(probs_BNV[:, parent], len(children), replacement=with_replacement)
    return tokens_BN


def time_in_turn(
    works: dict[str, Callable[[], object]], rounds: int, clock: Callable[[], float] = time.process_time
) -> dict[str, list[float]]:
    """Returns the milliseconds (by default of CPU time) that each piece of work took, but for a first round."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for number in range(rounds + 1):
        for name, work in works.items():
            began = clock()
            work()
            if number:
                times[name].append(1e3 * (clock() - began))
    return times


if __name__ == "__main__":
    try:
        main(*parse_settings(BenchmarkSettings, description=__doc__))
    except ValueError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
