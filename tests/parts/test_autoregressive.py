"""Tests of trees drafted by a draft model: their shapes, how siblings are sampled, and that decoding is lossless.

Shape suffixes: B rows, F parents, C children, N nodes, V vocabulary.
"""

import itertools
import math
from typing import Any

import pytest
import torch

import draftsmith
from draftsmith.core import drafter
from draftsmith.core.drafter import Session, Step
from draftsmith.core.tree import Draft
from draftsmith.drafters import lm
from draftsmith.drafters.lm import Config, Drafter
from draftsmith.parts import autoregressive
from tests.support.distributions import FALSE_ALARM, check_distribution, distribution_target, p_value
from tests.support.family import Watched, built, texts
from tests.support.models import greedy_by_transformers, padded, prompts, tiny_config, tiny_target

TREE = ((0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0))
PAIR = ((0,), (1,), (0, 0), (1, 0), (0, 0, 0), (1, 0, 0))
SHAPES: dict[str, dict[str, Any]] = {
    "without replacement": {"tree": TREE},
    "independent": {"tree": TREE, "siblings": "independent"},
    "independent paths": {"tree": PAIR, "siblings": "independent"},
    "top and drawn": {"tree": TREE, "siblings": "top_and_drawn"},
    "dynamic": {"width": 3, "num_nodes": 7, "num_draft": 3},
}
VERIFIERS = [
    pytest.param("without replacement", "recursive", marks=pytest.mark.slow),
    ("independent", "recursive"),
    pytest.param("independent", "kseq", marks=pytest.mark.slow),
    ("independent paths", "kseq"),
    pytest.param("independent paths", "multipath", marks=pytest.mark.slow),
]


def small(vocab_size: int, **changes: Any) -> Config:
    model = tiny_config("llama", vocab_size=vocab_size, num_hidden_layers=1).to_dict()
    return Config(model=model, **{"num_draft": 3, "length": "fixed"} | changes)


def small_drafter(**changes: Any) -> Drafter:
    return built(lm, small(distribution_target().vocab_size, **changes), distribution_target())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_greedy_output_is_transformers_own(architecture: str, shape: str) -> None:
    target = tiny_target(architecture)
    for num_rows, side in ((1, "right"), (5, "left")):
        ids, mask = padded(prompts(num_rows), side=side)
        watched = Watched(built(lm, small(target.vocab_size, **SHAPES[shape]), target))
        out = draftsmith.generate(target, ids, watched, attention_mask=mask, max_new_tokens=20)
        assert texts(out) == greedy_by_transformers(architecture, num_rows, 20)
        assert watched.num_drafted > 0


@pytest.mark.parametrize(
    "settings",
    [{"top_k": 3}, *(pytest.param(one, marks=pytest.mark.slow) for one in ({}, {"top_p": 0.7, "temperature": 0.8}))],
)
@pytest.mark.parametrize("shape", SHAPES)
def test_sampled_text_follows_the_target_distribution(shape: str, settings: dict[str, Any]) -> None:
    """With top-k 3 a distribution has fewer tokens than a level of the tree has nodes."""
    check_distribution(small_drafter(**SHAPES[shape]), distribution_target(), num_samples=5_000, **settings)


@pytest.mark.parametrize(("shape", "verifier"), VERIFIERS)
def test_sampled_text_follows_the_target_distribution_with_other_verifiers(shape: str, verifier: str) -> None:
    drafter = small_drafter(**SHAPES[shape])
    check_distribution(drafter, distribution_target(), num_samples=5_000, verifier=verifier, seed=2)
    check_distribution(drafter, distribution_target(), num_samples=3_000, verifier=verifier, seed=2, top_k=3)


def test_first_path_of_a_copy_of_the_target_is_accepted() -> None:
    """The tree mask shows the draft model each node's ancestors only."""
    target = tiny_target("llama")
    for shape, num_levels in (("without replacement", 3), ("dynamic", 1)):
        config = Config(model=target.model.config.to_dict(), **{"num_draft": 3, "length": "fixed"} | SHAPES[shape])
        drafter = Drafter(config, target)
        drafter.model.load_state_dict(target.model.state_dict())
        ids, mask = padded(prompts(5))
        out = draftsmith.generate(target, ids, drafter.eval(), attention_mask=mask, max_new_tokens=20)
        assert out.stats.accepted_per_depth[:num_levels] == [1] * num_levels


@pytest.mark.parametrize("count", [1, 2, 3])
def test_draw_siblings_without_replacement_matches_sequential_sampling(count: int) -> None:
    probs_V = torch.tensor([0.5, 0.3, 0.2, 0.0]).double()
    num_drawn, generator = 20_000, torch.Generator().manual_seed(0)
    drawn_BFC = autoregressive.draw_siblings(probs_V.expand(num_drawn, 1, 4), count, "without_replacement", generator)
    expected, counts = [], []
    for tokens in itertools.permutations(range(4), count):
        left = [1 - sum(probs_V[list(tokens[:at])].tolist()) for at in range(count)]
        expected.append(math.prod(float(probs_V[one]) / rest for one, rest in zip(tokens, left, strict=True)))
        counts.append(int((drawn_BFC[:, 0] == torch.tensor(tokens)).all(1).sum()))
    assert p_value(torch.tensor(counts).double(), torch.tensor(expected).double()) > FALSE_ALARM


def test_draw_siblings_returns_the_top_tokens_and_a_sampled_one() -> None:
    probs_V = torch.tensor([0.1, 0.4, 0.2, 0.3]).double()
    drawn_BFC = autoregressive.draw_siblings(
        probs_V.expand(4_000, 1, 4), 3, "top_and_drawn", torch.Generator().manual_seed(0)
    )
    assert (drawn_BFC[:, 0, :2] == torch.tensor([1, 3])).all()
    counts = torch.bincount(drawn_BFC[:, 0, 2], minlength=4).double()
    assert p_value(counts, torch.tensor([1 / 3, 0, 2 / 3, 0]).double()) > FALSE_ALARM


class _Recorder(drafter.Drafter):
    """A drafter that keeps its drafts."""

    def __init__(self, drafter: Drafter) -> None:
        self.config, self.target, self.hidden_layers = drafter.config, drafter.target, drafter.hidden_layers
        self._drafter, self.drafts = drafter, list[Draft]()

    def start(self, session: Session) -> None:
        self._drafter.start(session)

    def observe(self, step: Step) -> None:
        self._drafter.observe(step)

    def propose(self, budget: int) -> Draft:
        self.drafts.append(self._drafter.propose(budget))
        return self.drafts[-1]


def test_dynamic_tree_holds_the_likeliest_nodes() -> None:
    """Compares with all paths of up to two tokens, with levels wide enough to visit each of them."""
    target = distribution_target()
    drafter = _Recorder(small_drafter(width=8, num_nodes=10, num_draft=2))
    ids = torch.tensor([[1, 4, 2, 7]])
    draftsmith.generate(target, ids, drafter, max_new_tokens=8, seed=0)
    model, rows = drafter._drafter.model, torch.tensor([[1, 4, 2, 7]])
    with torch.no_grad():
        first_V = model(rows).logits[0, -1].log_softmax(-1)
        second_VV = model(torch.cat([rows.expand(8, -1), torch.arange(8)[:, None]], 1)).logits[:, -1].log_softmax(-1)
    scores = {(token,): float(first_V[token]) for token in range(8)}
    scores |= {(one, two): float(first_V[one] + second_VV[one, two]) for one in range(8) for two in range(8)}
    expected = set(sorted(scores, key=lambda path: -scores[path])[:10])
    draft = drafter.drafts[0]
    tokens, parents = draft.tokens_BN[0].tolist(), draft.tree.parents_RN[0].tolist()
    found = {(tokens[node],) if not parents[node] else (tokens[parents[node]], tokens[node]) for node in range(1, 11)}
    assert found == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tree": ((0, 0),)}, r"tree node \[0, 0\] needs node \[0\]"),
        ({"tree": ((0,), (2,))}, r"tree node \[2\] needs node \[1\]"),
        ({"tree": ((0,), (0,))}, "lists a node twice"),
        ({"tree": ((-1,),)}, "ranks from 0 up"),
        ({"siblings": "twins"}, "siblings is 'twins'; it must be one of without_replacement"),
        ({"width": -1}, "width is -1; it must be at least 0"),
        ({"width": 2, "tree": ((0,),)}, "give either a static tree or a width"),
    ],
)
def test_config_rejects_invalid_shapes(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(8, **changes)
