"""What verification costs: chains against transformers' own rule, and trees in passes over the vocabulary.

    .venv/bin/python benchmarks/verification.py

One core of an AMD EPYC, 128,000 tokens, the process's own time: on a chain of 8 the token rule is 1.2 to 1.9 times as
fast as transformers', block 1.1 to 1.65, traversal 1.2. Trees of 64 nodes, batch 8, in passes an accepted level:
recursive rejection 3 to 4, traversal 5 to 6 (it pays for nodes that it rejects on the way), once 6, most of it for
memory taken anew at its only level, K-SEQ 14 (it searches for rho), multi-path 28 (it grades every token).
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
from draftsmith.core.tree import Draft, Tree, chain
from draftsmith.length.costs import num_threads
from draftsmith.verify import block, deterministic, traversal
from draftsmith.verify.research import kseq, multipath, recursive, token
from eval.bakeoff.machine import hardware
from trainers.training.settings import parse_settings


@dataclass(frozen=True, kw_only=True)
class BenchmarkSettings:
    """The sizes, and how often everything is timed."""

    vocab_size: int = 128_000
    """Tokens."""
    num_drafted: int = 8
    """Length of the chain."""
    num_nodes: int = 64
    """Nodes of the tree, the pending one not counted: four children each of a node, three levels, cut to so many."""
    batch_size: int = 8
    """Rows of the tree."""
    rounds: int = 15
    """Times that each is timed; all are timed in turn."""
    threads: int = 1
    """CPU threads, 0 for torch's own choice."""
    seed: int = 0
    """Of laws, drafts and uniforms."""


def main(run: BenchmarkSettings) -> None:
    torch.manual_seed(run.seed)
    with num_threads(run.threads), torch.inference_mode():
        print(f"{hardware(torch.device('cpu'))}, {torch.get_num_threads()} thread(s), vocabulary {run.vocab_size:,}")
        chains(run)
        trees(run)


def chains(run: BenchmarkSettings) -> None:
    """Prints how long each rule takes for one chain, softmax of both logits included, beside transformers'."""
    draft_logits = 4 * torch.randn(1, run.num_drafted, run.vocab_size)
    target_logits = torch.nn.functional.pad(draft_logits, (0, 0, 0, 1)) + torch.randn(1, 1, run.vocab_size)
    drafted_BN = torch.multinomial(draft_logits[0].softmax(-1), 1)[:, 0][None]
    tree, sampling = chain(run.num_drafted + 1), Sampling(temperature=1.0)

    def by(rule: Callable[..., object]) -> Callable[[], object]:
        def work() -> object:
            draft = Draft(
                tokens_BN=torch.nn.functional.pad(drafted_BN, (1, 0)),
                tree=tree,
                draft_probs_BNV=sampling.probs(draft_logits),
                sampling_scheme="independent",
            )
            return rule(sampling.probs(target_logits), draft, torch.rand(1, run.num_drafted + 2, dtype=torch.float64))

        return work

    works = {
        "transformers": lambda: _speculative_sampling(drafted_BN, draft_logits, run.num_drafted, target_logits),
        "token": by(token.verify),
        "block": by(block.verify),
        "traversal": by(traversal.verify),
    }
    found = in_turn(works, run.rounds)
    print(f"a chain of {run.num_drafted}, batch 1")
    for name, times in found.items():
        ratio = statistics.median(theirs / ours for ours, theirs in zip(times, found["transformers"], strict=True))
        print(f"  {name:13} {statistics.median(times):7.2f} ms, {ratio:.2f} times as fast as transformers")


def trees(run: BenchmarkSettings) -> None:
    """Prints how long each rule takes for a batch of trees, in passes over [batch, vocabulary] an accepted level."""
    parents = [-1] + [node // 4 for node in range(run.num_nodes)]
    tree, shape = Tree.from_parents([parents]), (run.batch_size, run.num_nodes + 1, run.vocab_size)
    draft_BNV = (4 * torch.randn(shape)).softmax(-1)
    target_BNV = (draft_BNV.log() + torch.randn(shape)).softmax(-1)
    uniforms_BU = torch.rand(run.batch_size, run.num_nodes + 2, dtype=torch.float64)
    nodes, memory_BV = itertools.cycle(range(run.num_nodes)), torch.empty_like(target_BNV[:, 0])
    rules = {
        "deterministic": deterministic,
        "recursive": recursive,
        "traversal": traversal,
        "kseq": kseq,
        "multipath": multipath,
    }
    drafts = {}
    for sampling_scheme in ("independent", "without_replacement"):
        tokens_BN = filled(draft_BNV, parents, is_replaced=sampling_scheme == "independent")
        drafts[sampling_scheme] = Draft(
            tokens_BN=tokens_BN, tree=tree, draft_probs_BNV=draft_BNV, sampling_scheme=sampling_scheme
        )  # type: ignore[arg-type]
    drafts["deterministic"] = Draft(tokens_BN=drafts["without_replacement"].tokens_BN, tree=tree)
    cases = {
        f"{name} ({sampling_scheme.replace('_', ' ')})": (rule, drafts[sampling_scheme])
        for name, rule in rules.items()
        for sampling_scheme in rule.SCHEMES
    }
    works: dict[str, Callable[[], object]] = {
        name: lambda rule=rule, draft=draft: rule.verify(target_BNV, draft, uniforms_BU)  # type: ignore[misc]
        for name, (rule, draft) in cases.items()
    }
    # Two laws that no cache has, into memory that is in use.
    works["one pass"] = lambda: torch.sub(target_BNV[:, (node := next(nodes))], draft_BNV[:, node], out=memory_BV)
    found = in_turn(works, run.rounds)
    pass_ms = statistics.median(found.pop("one pass"))
    print(f"a tree of {run.num_nodes}, batch {run.batch_size}; one pass, the difference of two laws: {pass_ms:.2f} ms")
    for name, times in found.items():
        rule, draft = cases[name]
        levels = 1 + int(rule.verify(target_BNV, draft, uniforms_BU).num_accepted_B.max())
        median = statistics.median(times)
        print(f"  {name:33} {median:7.1f} ms, {median / pass_ms / levels:5.1f} passes for each of {levels} levels")


def filled(probs_BNV: Tensor, parents: list[int], *, is_replaced: bool) -> Tensor:
    """Returns tokens [B, N] drawn from their parents' laws, siblings with or without replacement."""
    tokens_BN = torch.zeros(probs_BNV.shape[:2], dtype=torch.long)
    for parent in sorted(set(parents[1:])):
        children = [node for node, above in enumerate(parents) if above == parent]
        tokens_BN[:, children] = torch.multinomial(probs_BNV[:, parent], len(children), replacement=is_replaced)
    return tokens_BN


def in_turn(works: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Returns the process's milliseconds in each piece of work, all of them done once before they are timed."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for number in range(rounds + 1):
        for name, work in works.items():
            began = time.process_time()
            work()
            if number:
                times[name].append(1e3 * (time.process_time() - began))
    return times


if __name__ == "__main__":
    try:
        main(*parse_settings(BenchmarkSettings, description=__doc__))
    except ValueError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
