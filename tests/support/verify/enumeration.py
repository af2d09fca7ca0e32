"""A verifier's exact output distribution, enumerated over all drafts of a shape and all uniforms, for three tokens.

A verifier tests `uniform < threshold` at most once per node, so that its outcome is a step function of each node's
uniform with one step. The threshold, given the outcomes of the other tests, is found by bisection; the next token's
distribution is the verdict's.

Shape suffixes: R rows (a draft and the outcomes of its tests), N nodes, V vocabulary.
"""

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from draftsmith.core.tree import Draft, Tree, Verdict

VOCAB_SIZE = 3
TOKENS = range(VOCAB_SIZE)
EXACT = 1e-12
HALVINGS = 54
FAILS = 1 - 2.0**-53

Text = tuple[int, ...]
Distributions = dict[Text, Tensor]  # the probabilities [V] after each text
Verify = Callable[[Tensor, Draft, Tensor], Verdict]


def random_distributions(longest: int, seed: int, *, zeros: bool = False) -> Distributions:
    """Returns a distribution after each text of up to `longest` tokens; with `zeros` some have zeros, as by top-k."""
    generator = torch.Generator().manual_seed(seed)
    probs = {}
    for size in range(longest + 1):
        for text in itertools.product(TOKENS, repeat=size):
            probs_V = torch.rand(VOCAB_SIZE, generator=generator, dtype=torch.float64)
            if zeros and len(probs) % 4:
                probs_V[len(probs) % 3 :: 4 - len(probs) % 4] = 0
                probs_V[(size + len(probs)) % 3] += 0.1
            probs[text] = probs_V / probs_V.sum()
    return probs


def probability(probs: Distributions, text: Text, given: Text = ()) -> float:
    """Returns the probability of `text` after `given`."""
    product = 1.0
    for at, one in enumerate(text):
        product *= probs[given + text[:at]][one].item()
    return product


def error(found: dict[Text, float], target: Distributions, num_tokens: int) -> float:
    """Returns the largest error of the distribution of `num_tokens` tokens, shorter outputs completed by the target."""
    total: dict[Text, float] = defaultdict(float)
    for text, weight in found.items():
        for rest in itertools.product(TOKENS, repeat=num_tokens - len(text)):
            total[text + rest] += weight * probability(target, rest, given=text)
    texts = itertools.product(TOKENS, repeat=num_tokens)
    return max(abs(total[text] - probability(target, text)) for text in texts)


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The shape of a draft tree and the sampling scheme of its siblings."""

    parents: tuple[int, ...]
    """-1 first."""
    sampling_scheme: str
    stops_at: int = -1
    """Nothing is drafted after this token: drafting may stop depending on what was drafted."""

    @property
    def depth(self) -> int:
        return Tree.from_parents([list(self.parents)]).depth


def paths(*, wide: int, deep: int, sampling_scheme: str = "independent", stops_at: int = -1) -> Shape:
    """Returns the shape of `wide` chains from node 0, each of `deep` nodes."""
    parents = [-1] + [0 if level == 0 else branch * deep + level for branch in range(wide) for level in range(deep)]
    return Shape(parents=tuple(parents), sampling_scheme=sampling_scheme, stops_at=stops_at)


def full(*widths: int, sampling_scheme: str) -> Shape:
    """Returns the shape in which every node of level i has `widths[i]` children."""
    parents, level = [-1], [0]
    for width in widths:
        above, level = level, []
        for node in above:
            for _ in range(width):
                parents.append(node)
                level.append(len(parents) - 1)
    return Shape(parents=tuple(parents), sampling_scheme=sampling_scheme)


def fillings(shape: Shape, draft_probs: Distributions) -> Iterator[tuple[list[Text], list[bool], float]]:
    """Yields each node's text, whether it is in use, and the probability, for every possible draft of the shape."""

    def grow(texts: list[Text], used: list[bool], weight: float) -> Iterator[tuple[list[Text], list[bool], float]]:
        node = len(texts)
        if node == len(shape.parents):
            yield texts, used, weight
            return
        parent = shape.parents[node]
        siblings = [texts[other][-1] for other in range(1, node) if shape.parents[other] == parent]
        num_later = shape.parents[node + 1 :].count(parent)
        probs_V = draft_probs[texts[parent]].clone()
        is_used = used[parent] and not (texts[parent] and texts[parent][-1] == shape.stops_at)
        if not is_used:
            yield from grow([*texts, (*texts[parent], 0)], [*used, False], weight)
            return
        if shape.sampling_scheme != "independent":
            probs_V[siblings] = 0
        if shape.sampling_scheme == "top_and_drawn" and num_later:
            probs_V = torch.nn.functional.one_hot(probs_V.argmax(), VOCAB_SIZE).double()
        if probs_V.sum() == 0:  # no token is left to draw: a token of probability 0 fills the node
            excluded = int((draft_probs[texts[parent]] == 0).nonzero()[0])
            yield from grow([*texts, (*texts[parent], excluded)], [*used, True], weight)
        for one in TOKENS:
            if probs_V[one] > 0:
                share = float(probs_V[one] / probs_V.sum())
                yield from grow([*texts, (*texts[parent], one)], [*used, True], weight * share)

    yield from grow([()], [True], 1.0)


def draft_of_fillings(
    shape: Shape, rows: list[list[Text]], used: list[list[bool]], draft_probs: Distributions, target: Distributions
) -> tuple:
    """Returns the draft whose rows are the fillings, unused nodes last, and the target's probabilities at its nodes."""
    tables = []
    for table in (target, draft_probs):
        tables.append(torch.stack([torch.stack([table[text] for text in texts]) for texts in rows]))
    num_nodes = [sum(one) for one in used]
    assert all(one == sorted(one, reverse=True) for one in used), "unused nodes must come last"
    draft = Draft(
        tokens_BN=torch.tensor([[text[-1] if text else 0 for text in texts] for texts in rows]),
        tree=Tree.from_parents([list(shape.parents)]),
        num_nodes=None if all(map(all, used)) else num_nodes,
        draft_probs_BNV=None if shape.sampling_scheme == "deterministic" else tables[1],
        sampling_scheme=shape.sampling_scheme,  # type: ignore[arg-type]
    )
    return draft, tables[0]


def output_distribution(
    verify: Verify, shape: Shape, draft_probs: Distributions, target: Distributions
) -> dict[Text, float]:
    """Returns the probability of each output of `verify`: accepted tokens and the next one."""
    rows, used, weights = map(list, zip(*fillings(shape, draft_probs), strict=True))
    num_nodes = len(shape.parents)
    # Node 0 is never tested.
    ends = torch.tensor(list(itertools.product([0.0, FAILS], repeat=num_nodes - 1)), dtype=torch.float64)
    draft, target_RNV = draft_of_fillings(shape, rows, used, draft_probs, target)
    index_R = torch.arange(len(rows)).repeat_interleave(len(ends))
    uniforms_RU = torch.full((len(index_R), num_nodes + 1), 0.5, dtype=torch.float64)
    uniforms_RU[:, 1:num_nodes] = ends.repeat(len(rows), 1)

    def run(uniforms_RU: Tensor, index_R: Tensor) -> tuple[Tensor, Tensor]:
        """Returns each row's last accepted node and the distribution of the next token."""
        chosen = Draft(
            tokens_BN=draft.tokens_BN[index_R],
            tree=draft.tree,
            num_nodes=None if draft.num_nodes is None else [draft.num_nodes[row] for row in index_R.tolist()],
            draft_probs_BNV=None if draft.draft_probs_BNV is None else draft.draft_probs_BNV[index_R],
            sampling_scheme=draft.sampling_scheme,
        )
        verdict = verify(target_RNV[index_R], chosen, uniforms_RU)
        assert verdict.next_probs_BV is not None
        next_probs_RV = verdict.next_probs_BV / verdict.next_probs_BV.sum(-1, keepdim=True)
        return verdict.path_BP.gather(1, verdict.num_accepted_B[:, None])[:, 0], next_probs_RV

    end_R, next_probs_RV = run(uniforms_RU, index_R)
    weight_R = torch.tensor(weights, dtype=torch.float64)[index_R]
    tests = []  # of each node: the rows that pass its test, and which of these it makes a difference to
    for node in range(1, num_nodes):
        passes_R = (uniforms_RU[:, node] == 0).nonzero()[:, 0]
        step = 2 ** (num_nodes - 1 - node)  # distance to the same row with this test failed
        differ_R = (end_R[passes_R] != end_R[passes_R + step]) | (
            next_probs_RV[passes_R] != next_probs_RV[passes_R + step]
        ).any(1)
        tests.append((node, step, passes_R, differ_R))
    # The thresholds of all nodes are found together.
    asked_R = torch.cat([passes_R[differ_R] for _, _, passes_R, differ_R in tests])
    node_R = torch.cat([torch.full((int(differ_R.sum()),), node) for node, _, _, differ_R in tests])
    low_R, high_R = torch.zeros(len(asked_R), dtype=torch.float64), torch.ones(len(asked_R), dtype=torch.float64)
    probed_RU = uniforms_RU[asked_R]
    for _ in range(HALVINGS if len(asked_R) else 0):
        middle_R = (low_R + high_R) / 2
        probed_RU[torch.arange(len(asked_R)), node_R] = middle_R
        end, next_probs = run(probed_RU, index_R[asked_R])
        is_pass_R = (end == end_R[asked_R]) & (next_probs == next_probs_RV[asked_R]).all(1)
        low_R, high_R = torch.where(is_pass_R, middle_R, low_R), torch.where(is_pass_R, high_R, middle_R)
    for node, step, passes_R, differ_R in tests:
        known = ((low_R + high_R) / 2)[node_R == node]
        threshold_R = fill_thresholds(index_R[passes_R], differ_R, known, len(rows))
        weight_R[passes_R] *= threshold_R
        weight_R[passes_R + step] *= 1 - threshold_R
    found: dict[Text, float] = defaultdict(float)
    is_likely_R = weight_R > 0
    for index, end, chance, next_probs in zip(
        index_R[is_likely_R].tolist(),
        end_R[is_likely_R].tolist(),
        weight_R[is_likely_R].tolist(),
        next_probs_RV[is_likely_R].tolist(),
        strict=True,
    ):
        for one in TOKENS:
            found[(*rows[index][end], one)] += chance * next_probs[one]
    return found


def fill_thresholds(index_R: Tensor, is_known_R: Tensor, known: Tensor, num_fillings: int) -> Tensor:
    """Returns each row's threshold, also for tests without effect given the outcomes of the others.

    If all known thresholds of a filling are equal, theirs is used: two tests may each have the effect of the other. If
    not, a half: then nothing depends on it.
    """
    lowest, highest = torch.full((num_fillings,), 2.0).double(), torch.full((num_fillings,), -1.0).double()
    lowest.scatter_reduce_(0, index_R[is_known_R], known, "amin")
    highest.scatter_reduce_(0, index_R[is_known_R], known, "amax")
    is_same = (highest - lowest).abs() < EXACT / 10
    threshold_R = torch.where(is_same, (lowest + highest) / 2, 0.5)[index_R]
    threshold_R[is_known_R] = known
    return threshold_R


def texts_of(verdict: Verdict, tokens_BN: Tensor) -> Iterator[Text]:
    """Yields each row's output: its accepted tokens and the next one."""
    for row in range(len(tokens_BN)):
        path = verdict.path_BP[row, 1 : int(verdict.num_accepted_B[row]) + 1]
        yield (*tokens_BN[row, path].tolist(), int(verdict.next_token_B[row]))


def expected_tokens(found: dict[Text, float]) -> float:
    """Returns the mean number of tokens per round."""
    return sum(len(text) * weight for text, weight in found.items())
