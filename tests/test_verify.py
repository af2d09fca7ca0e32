"""Verifiers: their output law by exact enumeration over all uniforms, against the target's; and which one is chosen.

A verifier is a step function of each uniform. Where its steps lie is known in closed form, so that one uniform from
each cell between two steps, weighted by the cell's width, integrates exactly.

Shape suffixes: B rows, N nodes, V vocabulary, U uniforms.
"""

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator

import pytest
import torch
from torch import Tensor

from draftsmith.sampling import Sampling
from draftsmith.tree import Draft, Tree, chain
from draftsmith.verify import choose, greedy, names, once, token, typical
from draftsmith.verify.verdict import Verdict

VOCAB_SIZE = 3
TOKENS = range(VOCAB_SIZE)
EXACT = 1e-12

Text = tuple[int, ...]
Laws = dict[Text, Tensor]  # what follows each text [V]


def random_laws(longest: int, seed: int, *, zeros: bool = False) -> Laws:
    """Returns a law after each text of up to `longest` tokens; with `zeros` some have no chance, as after top-k."""
    generator = torch.Generator().manual_seed(seed)
    laws = {}
    for size in range(longest + 1):
        for text in itertools.product(TOKENS, repeat=size):
            law_V = torch.rand(VOCAB_SIZE, generator=generator, dtype=torch.float64)
            if zeros and len(laws) % 4:
                law_V[len(laws) % 3 :: 4 - len(laws) % 4] = 0
                law_V[(size + len(laws)) % 3] += 0.1
            laws[text] = law_V / law_V.sum()
    return laws


def probability(laws: Laws, text: Text, given: Text = ()) -> float:
    """Returns the probability of going on with `text` after `given`."""
    product = 1.0
    for at, one in enumerate(text):
        product *= laws[given + text[:at]][one].item()
    return product


def steps(*running: Iterable[float]) -> list[tuple[float, float]]:
    """Returns a uniform inside each cell between steps, and the cell's width."""
    edges = sorted({0.0, 1.0, *(edge for edges in running for edge in edges if 0 < edge < 1)})
    return [((low + high) / 2, high - low) for low, high in itertools.pairwise(edges) if high - low > 1e-15]


def draws(weights_V: Tensor) -> list[float]:
    return (weights_V.cumsum(-1) / weights_V.sum()).tolist()


def texts_of(verdict: Verdict, tokens_BN: Tensor) -> Iterator[Text]:
    """Yields what each row puts out: its accepted tokens and the next one."""
    for row in range(len(tokens_BN)):
        path = verdict.path_BP[row, 1 : int(verdict.num_accepted_B[row]) + 1]
        yield (*tokens_BN[row, path].tolist(), int(verdict.next_token_B[row]))


def error(found: dict[Text, float], target: Laws, num_tokens: int) -> float:
    """Returns the largest error of the law of the first `num_tokens`, what is missing being sampled from the target."""
    law: dict[Text, float] = defaultdict(float)
    for text, weight in found.items():
        for rest in itertools.product(TOKENS, repeat=num_tokens - len(text)):
            law[text + rest] += weight * probability(target, rest, given=text)
    texts = itertools.product(TOKENS, repeat=num_tokens)
    return max(abs(law[text] - probability(target, text)) for text in texts)


def chain_cells(target: Laws, draft: Laws, drafted: Text, used: int) -> Iterator[tuple[list[float], float]]:
    """Yields uniforms [U] from each cell of the token rule for one chain, and the cell's volume."""
    accept, residuals = [], [draws(target[drafted[:used]])]
    for at, one in enumerate(drafted):
        p_V, q_V = target[drafted[:at]], draft[drafted[:at]]
        accept.append(steps([(p_V[one] / q_V[one]).item()]))
        residual_V = (p_V - q_V).clamp(min=0)
        residuals.append(draws(residual_V) if residual_V.sum() > 0 else draws(p_V))
    for cell in itertools.product(*accept, steps(*residuals)):
        *accepting, drawing = (uniform for uniform, _ in cell)
        yield [*accepting, 0.5, drawing], math.prod(width for _, width in cell)


def laws_along(laws: Laws, texts: list[Text], num_laws: int) -> Tensor:
    """Returns the laws [B, N, V] met along each text, from its beginning on."""
    return torch.stack([torch.stack([laws[text[:at]] for at in range(num_laws)]) for text in texts])


def chain_law(target: Laws, draft: Laws, num_drafted: int, used_of: Callable[[Text], int]) -> dict[Text, float]:
    """Returns the law of what the token rule puts out when chains are drawn from `draft` and cut by `used_of`."""
    rows: list[tuple[Text, list[float], float]] = []
    for drafted in itertools.product(TOKENS, repeat=num_drafted):
        weight = probability(draft, drafted)
        if weight > 0:
            cells = chain_cells(target, draft, drafted, used_of(drafted))
            rows += [(drafted, uniforms, weight * volume) for uniforms, volume in cells]
    texts = [text for text, _, _ in rows]
    is_drawn = any(law_V.max() < 1 for law_V in draft.values())
    filled = Draft(
        tokens_BN=torch.tensor([[0, *text] for text in texts]),
        tree=chain(num_drafted + 1),
        num_nodes=[used_of(text) + 1 for text in texts],
        draft_probs_BNV=laws_along(draft, texts, num_drafted) if is_drawn else None,
        drawn="independent" if is_drawn else "deterministic",
    )
    uniforms_BU = torch.tensor([uniforms for _, uniforms, _ in rows], dtype=torch.float64)
    verdict = token.verify(laws_along(target, texts, num_drafted + 1), filled, uniforms_BU)
    found: dict[Text, float] = defaultdict(float)
    for text, (_, _, weight) in zip(texts_of(verdict, filled.tokens_BN), rows, strict=True):
        found[text] += weight
    return found


@pytest.mark.parametrize("num_drafted", [1, 2, 3])
@pytest.mark.parametrize("zeros", [False, True])
def test_the_token_rule_keeps_the_law(num_drafted: int, zeros: bool) -> None:
    target = random_laws(num_drafted, seed=num_drafted, zeros=zeros)
    for seed in (50, 51):
        draft = random_laws(num_drafted, seed=seed, zeros=zeros)
        found = chain_law(target, draft, num_drafted, lambda _: num_drafted)
        assert error(found, target, num_drafted + 1) < EXACT
    found = chain_law(target, target, num_drafted, lambda _: num_drafted)
    assert error(found, target, num_drafted + 1) < EXACT
    assert {len(text) for text in found} == {num_drafted + 1}, "a draft by the target's own law is always accepted"


@pytest.mark.parametrize("stop", [0, 1, 2])
def test_a_draft_that_stops_at_a_token_keeps_the_law(stop: int) -> None:
    """As drafting does that stops for want of confidence: the tokens after the stop are padding."""

    def used(drafted: Text) -> int:
        return drafted.index(stop) + 1 if stop in drafted else len(drafted)

    target, draft = random_laws(3, seed=8), random_laws(3, seed=9)
    assert error(chain_law(target, draft, 3, used), target, 4) < EXACT


@pytest.mark.parametrize("drafted", [(0,), (2, 1), (1, 1, 0)])
def test_the_token_rule_keeps_the_law_of_deterministic_chains(drafted: Text) -> None:
    """Such a draft is drawn from a law that is one at its token."""
    one_hot = torch.eye(VOCAB_SIZE, dtype=torch.float64)
    draft = {text: one_hot[drafted[len(text)] if len(text) < len(drafted) else 0] for text in random_laws(3, seed=0)}
    for zeros in (False, True):
        target = random_laws(3, seed=11, zeros=zeros)
        found = chain_law(target, draft, len(drafted), lambda _: len(drafted))
        assert error(found, target, len(drafted) + 1) < EXACT


def small_trees() -> Iterator[tuple[list[int], Text]]:
    """Yields every tree of up to four nodes whose siblings differ, with every labelling."""
    for num_nodes in range(1, 5):
        for parents in itertools.product(*(range(node) for node in range(1, num_nodes))):
            for labels in itertools.product(TOKENS, repeat=num_nodes - 1):
                if len(set(zip(parents, labels, strict=True))) == num_nodes - 1:
                    yield [-1, *parents], labels


def tree_law(target: Laws, parents: list[int], labels: Text, used: int) -> dict[Text, float]:
    """Returns the law of what the once-per-node rule puts out for a tree of which `used` nodes are in use."""
    prefixes: list[Text] = [()]
    for parent, label in zip(parents[1:], labels, strict=True):
        prefixes.append((*prefixes[parent], label))
    rows = list(itertools.product(*(steps(draws(target[prefix])) for prefix in prefixes)))
    draft = Draft(
        tokens_BN=torch.tensor([[0, *labels]]).expand(len(rows), -1),
        tree=Tree.from_parents([parents]),
        num_nodes=None if used == len(parents) else [used] * len(rows),
    )
    target_probs_BNV = torch.stack([target[prefix] for prefix in prefixes]).expand(len(rows), -1, -1)
    uniforms = [[*(uniform for uniform, _ in row), 0.5] for row in rows]
    verdict = once.verify(target_probs_BNV, draft, torch.tensor(uniforms, dtype=torch.float64))
    found: dict[Text, float] = defaultdict(float)
    for text, row in zip(texts_of(verdict, draft.tokens_BN), rows, strict=True):
        found[text] += math.prod(width for _, width in row)
    return found


@pytest.mark.parametrize("zeros", [False, True])
def test_once_per_node_keeps_the_law_on_every_small_tree(zeros: bool) -> None:
    target = random_laws(4, seed=21, zeros=zeros)
    for parents, labels in small_trees():
        found = tree_law(target, parents, labels, len(parents))
        assert error(found, target, 4) < EXACT, (parents, labels)
        # No rule accepts more: the first token is accepted with the probability of node 0's children.
        children = {label for parent, label in zip(parents[1:], labels, strict=True) if parent == 0}
        accepted = sum(weight for text, weight in found.items() if len(text) > 1)
        assert accepted == pytest.approx(sum(target[()][child].item() for child in children), abs=EXACT)


def test_siblings_that_agree_keep_the_law_too() -> None:
    """Both stand for one text, whose next token must not be drawn twice."""
    target = random_laws(4, seed=23)
    for parents, labels in (([-1, 0, 0, 2], (0, 0, 0)), ([-1, 0, 0, 1], (1, 1, 2)), ([-1, 0, 1, 1], (0, 2, 2))):
        assert error(tree_law(target, parents, labels, 4), target, 4) < EXACT, (parents, labels)


@pytest.mark.parametrize("used", [1, 2, 3])
def test_nodes_not_in_use_change_nothing(used: int) -> None:
    target = random_laws(4, seed=22)
    for parents, labels in small_trees():
        if len(parents) > used:
            found = tree_law(target, parents, labels, used)
            expected = tree_law(target, parents[:used], labels[: used - 1], used)
            assert found == pytest.approx(expected, abs=EXACT), (parents, labels)


def test_greedy_takes_the_argmaxes() -> None:
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
        ([0.5, 0.3, 0.2], [0.5, 0.3, 0.2], 1.0),  # always: the same law
        ([0.8, 0.1, 0.1], [0.5, 0.3, 0.2], 1.0),  # always: likelier still under the target
        ([0.25, 0.5, 0.25], [0.5, 0.25, 0.25], 0.5),  # sometimes
        ([0.0, 0.6, 0.4], [1.0, 0.0, 0.0], 0.0),  # never: the target excludes it
    ],
)
def test_always_sometimes_never(
    dtype: torch.dtype, target_probs: list[float], draft_probs: list[float], accepted_below: float
) -> None:
    """The hand-written logits of a draft of token 0, over uniforms that include both edges."""
    logits_BNV = torch.tensor([target_probs, target_probs], dtype=dtype).log().expand(6, 2, 3)
    uniforms = [0.0, 0.25, 0.499, 0.501, 0.75, math.nextafter(1.0, 0.0)]
    draft = Draft(
        tokens_BN=torch.tensor([[7, 0]] * 6),
        tree=chain(2),
        draft_probs_BNV=torch.tensor([[draft_probs]], dtype=dtype).expand(6, 1, 3),
        drawn="independent",
    )
    uniforms_BU = torch.tensor([[uniform, 0.5, uniform] for uniform in uniforms], dtype=torch.float64)
    verdict = token.verify(Sampling(temperature=1.0).law(logits_BNV), draft, uniforms_BU)
    assert verdict.num_accepted_B.tolist() == [int(uniform < accepted_below) for uniform in uniforms]
    for accepted, after in zip(verdict.num_accepted_B.tolist(), verdict.next_token_B.tolist(), strict=True):
        law = target_probs if accepted else [max(p - q, 0) for p, q in zip(target_probs, draft_probs, strict=True)]
        assert law[after] > 0


def test_typical_acceptance_by_hand() -> None:
    """Accepts what is likelier than min(0.09, 0.3 exp(-entropy)), as in Medusa's paper.

    Node 0: (0.90, 0.08, 0.02) has entropy 0.375, so that the bound is 0.09 and 0.08 falls short of it. Node 1: one
    token at 0.34 and eleven at 0.06 have entropy 2.224: the bound is 0.0325, and 0.06 passes.
    """
    sharp_V = torch.tensor([0.90, 0.08, 0.02] + [0.0] * 9, dtype=torch.float64)
    flat_V = torch.tensor([0.34] + [0.06] * 11, dtype=torch.float64)
    target_probs_BNV = torch.stack([sharp_V, flat_V, flat_V, flat_V, flat_V])[None]
    tree = Tree.from_parents([[-1, 0, 0, 1, 2]])
    draft = Draft(tokens_BN=torch.tensor([[5, 0, 1, 7, 0]]), tree=tree)
    uniforms_BU = torch.tensor([[0.0, 0.0, 0.0, 0.99, 0.0, 0.0]], dtype=torch.float64)
    verdict = typical.verify(target_probs_BNV, draft, uniforms_BU)
    assert verdict.path_BP[0].tolist() == [0, 1, 3] and verdict.next_token_B.tolist() == [11]
    by_two = Draft(tokens_BN=torch.tensor([[5, 2, 1, 7, 0]]), tree=tree)
    assert typical.verify(target_probs_BNV, by_two, uniforms_BU).num_accepted_B.tolist() == [0]


def draft_of(drawn: str, *, is_chain: bool = True) -> Draft:
    tree = chain(3) if is_chain else Tree.from_parents([[-1, 0, 0]])
    laws = None if drawn == "deterministic" else torch.full((1, 2, 3), 1 / 3)
    return Draft(tokens_BN=torch.zeros(1, 3, dtype=torch.long), tree=tree, draft_probs_BNV=laws, drawn=drawn)  # type: ignore[arg-type]


def test_auto_chooses_a_lossless_verifier_that_fits() -> None:
    sampled, greedy_sampling = Sampling(temperature=1.0), Sampling()
    for drawn, is_chain in (("deterministic", True), ("deterministic", False), ("independent", True)):
        assert choose("auto", greedy_sampling, draft_of(drawn, is_chain=is_chain)) is greedy
    assert choose("auto", sampled, draft_of("deterministic")) is once
    assert choose("auto", sampled, draft_of("deterministic", is_chain=False)) is once
    assert choose("auto", sampled, draft_of("independent")) is token
    assert set(names()) >= {"greedy", "once", "token", "typical"} and "verdict" not in names()
    assert [module.LOSSLESS for module in (greedy, once, token, typical)] == [True, True, True, False]


def test_what_is_lossy_must_be_asked_for() -> None:
    for drawn in ("deterministic", "independent"):
        for sampling in (Sampling(temperature=1.0), Sampling()):
            assert choose("auto", sampling, draft_of(drawn)).LOSSLESS
            assert choose("typical", sampling, draft_of(drawn)) is typical


@pytest.mark.parametrize(
    ("name", "temperature", "drawn", "is_chain", "message"),
    [
        ("nosuch", 1.0, "deterministic", True, "unknown verifier 'nosuch'; there are auto, greedy, "),
        ("verdict", 1.0, "deterministic", True, "unknown verifier 'verdict'"),
        ("once", 1.0, "independent", True, "verifier 'once' does not fit a draft drawn independent"),
        ("token", 1.0, "without_replacement", True, "verifier 'token' does not fit a draft drawn without replacement"),
        ("token", 1.0, "independent", False, "verifier 'token' takes chains"),
        ("token", 1.0, "deterministic", False, "verifier 'token' takes chains"),
        ("greedy", 0.5, "deterministic", True, "verifier 'greedy' is for temperature 0, not 0.5"),
        ("once", 0.0, "deterministic", True, "verifier 'once' keeps a sampled law; at temperature 0"),
    ],
)
def test_a_verifier_that_would_not_keep_its_promise_is_refused(
    name: str, temperature: float, drawn: str, is_chain: bool, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        choose(name, Sampling(temperature=temperature), draft_of(drawn, is_chain=is_chain))
