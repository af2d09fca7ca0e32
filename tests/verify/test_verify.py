"""Verifiers on hand-worked drafts, and the choice of a verifier; their distributions are in test_verify_exact.py.

Shape suffixes: B rows, N nodes, V vocabulary, U uniforms.
"""

import dataclasses
import math

import pytest
import torch

from draftsmith.core.sampling import Sampling
from draftsmith.core.tree import Draft, Tree, chain
from draftsmith.verify import VERIFIERS, choose, find, greedy, verify_draft
from draftsmith.verify.lossy import bild, typical
from draftsmith.verify.research import token
from tests.support.verify.enumeration import VOCAB_SIZE, texts_of


def test_greedy_accepts_the_path_of_argmaxes() -> None:
    tree = Tree.from_parents([[-1, 0, 0, 1, 2, 2]])
    draft = Draft(tokens_BN=torch.tensor([[9, 0, 1, 2, 0, 2]] * 3), tree=tree)
    scores = torch.zeros(3, 6, VOCAB_SIZE)
    best = [[1, 0, 2, 0, 0, 1], [0, 1, 0, 0, 0, 0], [2, 1, 1, 1, 1, 1]]
    for row, choices in enumerate(best):
        for node, choice in enumerate(choices):
            scores[row, node, choice] = 1.0
    verdict = greedy.verify(scores, draft, scores)
    assert list(texts_of(verdict, draft.tokens_BN)) == [(1, 2, 1), (0, 1), (2,)]
    assert verdict.num_accepted_B.tolist() == [2, 1, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("target_probs", "draft_probs", "accepted_below"),
    [
        ([0.5, 0.3, 0.2], [0.5, 0.3, 0.2], 1.0),  # always: the same distribution
        ([0.8, 0.1, 0.1], [0.5, 0.3, 0.2], 1.0),  # always: likelier under the target
        ([0.25, 0.5, 0.25], [0.5, 0.25, 0.25], 0.5),  # sometimes
        ([0.0, 0.6, 0.4], [1.0, 0.0, 0.0], 0.0),  # never: the target excludes it
    ],
)
def test_token_accepts_by_the_ratio_of_probabilities(
    dtype: torch.dtype, target_probs: list[float], draft_probs: list[float], accepted_below: float
) -> None:
    """Hand-written logits and a draft of token 0, over uniforms that include both edges."""
    logits_BNV = torch.tensor([target_probs, target_probs], dtype=dtype).log().expand(6, 2, 3)
    uniforms = [0.0, 0.25, 0.499, 0.501, 0.75, math.nextafter(1.0, 0.0)]
    draft = Draft(
        tokens_BN=torch.tensor([[7, 0]] * 6),
        tree=chain(2),
        draft_probs_BNV=torch.tensor([[draft_probs]], dtype=dtype).expand(6, 1, 3),
        sampling_scheme="independent",
    )
    uniforms_BU = torch.tensor([[0.5, uniform, uniform] for uniform in uniforms], dtype=torch.float64)
    verdict = token.verify(Sampling(temperature=1.0).probs(logits_BNV), draft, uniforms_BU)
    assert verdict.num_accepted_B.tolist() == [int(uniform < accepted_below) for uniform in uniforms]
    for accepted, after in zip(verdict.num_accepted_B.tolist(), verdict.next_token_B.tolist(), strict=True):
        residual = [max(p - q, 0) for p, q in zip(target_probs, draft_probs, strict=True)]
        assert (target_probs if accepted else residual)[after] > 0


def test_typical_acceptance_hand_worked() -> None:
    """Tokens likelier than min(0.09, 0.3 exp(-entropy)) are accepted, as in Medusa's paper.

    Node 0: (0.90, 0.08, 0.02) has entropy 0.375, so that the threshold is 0.09 and 0.08 fails. Node 1: one token at
    0.34 and eleven at 0.06 have entropy 2.224: the threshold is 0.0325, and 0.06 passes.
    """
    sharp_V = torch.tensor([0.90, 0.08, 0.02] + [0.0] * 9, dtype=torch.float64)
    flat_V = torch.tensor([0.34] + [0.06] * 11, dtype=torch.float64)
    target_probs_BNV = torch.stack([sharp_V, flat_V, flat_V, flat_V, flat_V])[None]
    tree = Tree.from_parents([[-1, 0, 0, 1, 2]])
    draft = Draft(tokens_BN=torch.tensor([[5, 0, 1, 7, 0]]), tree=tree)
    uniforms_BU = torch.tensor([[0.0, 0.0, 0.0, 0.99, 0.0, 0.0]], dtype=torch.float64)
    verdict = typical.verify(target_probs_BNV, draft, uniforms_BU)
    assert verdict.path_BP[0].tolist() == [0, 1, 3] and verdict.next_token_B.tolist() == [11]
    rejected = Draft(tokens_BN=torch.tensor([[5, 2, 1, 7, 0]]), tree=tree)
    assert typical.verify(target_probs_BNV, rejected, uniforms_BU).num_accepted_B.tolist() == [0]


def draft_of(sampling_scheme: str, *, is_chain: bool = True) -> Draft:
    tree = chain(3) if is_chain else Tree.from_parents([[-1, 0, 0]])
    return Draft(
        tokens_BN=torch.zeros(1, 3, dtype=torch.long),
        tree=tree,
        draft_probs_BNV=None if sampling_scheme == "deterministic" else torch.full((1, 2, 3), 1 / 3),
        sampling_scheme=sampling_scheme,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(
    ("sampling_scheme", "for_chain", "for_tree"),
    [
        ("deterministic", "deterministic", "deterministic"),
        ("independent", "block", "traversal"),
        ("without_replacement", "block", "traversal"),
        ("top_and_drawn", "greedy_drafting", "greedy_drafting"),
    ],
)
def test_choose_auto_returns_the_lossless_verifier_of_the_scheme(
    sampling_scheme: str, for_chain: str, for_tree: str
) -> None:
    for is_chain, expected in ((True, for_chain), (False, for_tree)):
        draft = draft_of(sampling_scheme, is_chain=is_chain)
        assert choose("auto", Sampling(), draft).name == "greedy"
        chosen = choose("auto", Sampling(temperature=1.0), draft)
        assert chosen.name == expected and chosen.is_lossless
        assert chosen == choose(expected, Sampling(temperature=1.0), draft)


def test_choose_returns_lossy_verifiers_only_by_name() -> None:
    for name in ("typical", "lenience", "bild"):
        for sampling in (Sampling(temperature=1.0), Sampling()):
            assert not choose(name, sampling, draft_of("deterministic")).is_lossless
    assert sorted(name for name in VERIFIERS if not find(name)[0].LOSSLESS) == ["bild", "lenience", "typical"]


def test_find_accepts_the_former_name_of_deterministic() -> None:
    assert find("once") == find("deterministic")


def test_choose_passes_a_number_to_the_verifier() -> None:
    draft = draft_of("deterministic")
    for name, parameter, value in (("lenience=0.7", "lenience", 0.7), ("bild=2", "rollback", 2.0)):
        assert choose(name, Sampling(temperature=1.0), draft).verify.keywords == {parameter: value}  # type: ignore[attr-defined]
    assert choose("bild", Sampling(), draft).sampling == Sampling(temperature=1.0)


def test_bild_rollback_hand_worked() -> None:
    """Tokens likelier than exp(-2) = 0.135, and argmaxes, are accepted; the argmax at the end is the next token."""
    probs = [[0.6, 0.2, 0.2], [0.1, 0.8, 0.1], [0.2, 0.3, 0.5], [0.4, 0.3, 0.3]]
    target_probs_BNV = torch.tensor([probs] * 3).double()
    draft = Draft(
        tokens_BN=torch.tensor([[9, 1, 1, 0], [9, 1, 0, 2], [9, 0, 1, 2]]), tree=chain(4), num_nodes=[4, 4, 2]
    )
    verdict = bild.verify(target_probs_BNV, draft, torch.zeros(3, 5), rollback=2.0)
    assert list(texts_of(verdict, draft.tokens_BN)) == [(1, 1, 0, 0), (1, 1), (0, 1)]


@pytest.mark.parametrize(
    ("name", "temperature", "sampling_scheme", "is_chain", "message"),
    [
        ("nosuch", 1.0, "deterministic", True, "unknown verifier 'nosuch'; choose one of auto, bild, block, "),
        ("verdict", 1.0, "deterministic", True, "unknown verifier 'verdict'"),
        (
            "deterministic",
            1.0,
            "independent",
            True,
            "verifier 'deterministic' does not support drafts of .*'independent'",
        ),
        (
            "token",
            1.0,
            "without_replacement",
            True,
            "verifier 'token' does not support drafts of .*'without_replacement'",
        ),
        ("token", 1.0, "independent", False, "verifier 'token' takes chains"),
        ("token", 1.0, "deterministic", False, "verifier 'token' takes chains"),
        ("lenience=much", 1.0, "deterministic", True, "verifier lenience=much: 'much' is not a number"),
        ("token=2", 1.0, "deterministic", True, "verifier 'token' takes no number, but '2' was given"),
        ("recursive", 1.0, "top_and_drawn", False, "verifier 'recursive' does not support drafts of .*'top_and_drawn'"),
        ("greedy", 0.5, "deterministic", True, "verifier 'greedy' is for temperature 0, not 0.5"),
        ("deterministic", 0.0, "deterministic", True, "verifier 'deterministic' is for sampling; at temperature 0"),
    ],
)
def test_choose_rejects_an_unknown_or_invalid_verifier(
    name: str, temperature: float, sampling_scheme: str, is_chain: bool, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        choose(name, Sampling(temperature=temperature), draft_of(sampling_scheme, is_chain=is_chain))


NOT_FINITE = "the target's logits are NaN or infinite"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_verify_draft_rejects_logits_that_are_not_finite(temperature: float, value: float) -> None:
    draft = Draft(tokens_BN=torch.tensor([[1, 2, 3]]), tree=chain(3))
    sampling, generator = Sampling(temperature=temperature), torch.Generator().manual_seed(0)
    logits_BNV = torch.randn(1, 3, VOCAB_SIZE, generator=generator)
    logits_BNV[0, 0, 0] = -math.inf
    verify_draft(logits_BNV, draft, sampling, "auto", generator)
    logits_BNV[0, 2, 1] = value
    with pytest.raises(ValueError, match=NOT_FINITE):
        verify_draft(logits_BNV, draft, sampling, "auto", generator)
    unused = dataclasses.replace(draft, num_nodes=[2])
    verify_draft(logits_BNV, unused, sampling, "auto", generator)


@pytest.mark.parametrize(
    "name", ["auto", "token", "block", "traversal", "recursive", "lenience=0.5", "kseq", "multipath"]
)
@pytest.mark.parametrize("fault", ["nan", "negative", "zero", "sum"])
def test_verify_draft_rejects_what_is_no_distribution(name: str, fault: str) -> None:
    probs_BNV = torch.full((2, 3, VOCAB_SIZE), 1 / VOCAB_SIZE)
    draft = Draft(
        tokens_BN=torch.tensor([[0, 1, 2], [1, 2, 0]]),
        tree=chain(3),
        draft_probs_BNV=probs_BNV,
        sampling_scheme="independent",
    )
    logits_BNV, sampling = torch.randn(2, 3, VOCAB_SIZE), Sampling(temperature=1.0)
    generator = torch.Generator().manual_seed(0)
    probs_BNV[:, 2] = math.nan  # no token was sampled from the distribution of the last node
    verify_draft(logits_BNV, draft, sampling, name, generator)
    probs_BNV[1, 1, :2] += {"nan": math.nan, "negative": 0, "zero": 0, "sum": 0.1}[fault]
    if fault == "negative":
        probs_BNV[1, 1, :2] += torch.tensor([-1.0, 1.0])
    if fault == "zero":
        probs_BNV[1, 1] = 0
    with pytest.raises(ValueError, match="the drafter's probabilities are no distribution"):
        verify_draft(logits_BNV, draft, sampling, name, generator)
