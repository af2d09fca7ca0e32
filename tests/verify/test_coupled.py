"""The verifier "coupled": its output is Gumbel-max sampling by the noise of positions, whatever was drafted.

Shape suffixes: R rows, N nodes, V vocabulary.
"""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import draftsmith
from draftsmith.core.tree import Draft, chain
from draftsmith.drafters import lm
from draftsmith.verify.research import coupled
from draftsmith.verify.research.position_noise import PositionNoise, exponentials
from tests.support.drafters import TREE, Scripted, generate_rows, tiny_drafter
from tests.support.family import texts
from tests.support.models import prompts, tiny_target
from tests.support.verify.enumeration import (
    VOCAB_SIZE,
    Distributions,
    Shape,
    Text,
    draft_of_fillings,
    fillings,
    full,
    paths,
    random_distributions,
    texts_of,
)

SAMPLED: dict[str, Any] = {"temperature": 1.0, "seed": 7, "verifier": "coupled"}
SHAPES = [
    Shape(parents=(-1,), sampling_scheme="independent"),
    paths(wide=1, deep=3),
    paths(wide=1, deep=3, stops_at=0),
    paths(wide=2, deep=2),
    Shape(parents=(-1, 0, 1, 1, 2), sampling_scheme="without_replacement"),
    full(2, 1, sampling_scheme="top_and_drawn"),
]
PROMPT_LENGTH = 4


def reference(target: Distributions, seed: int, row: int, length: int) -> Text:
    """Returns argmax(log target + Gumbel noise), token after token."""
    text: Text = ()
    for position in range(PROMPT_LENGTH, PROMPT_LENGTH + length):
        gumbel = [-math.log(one) for one in exponentials([(seed, row)], [position], VOCAB_SIZE)[0].tolist()]
        probs = target[text].tolist()
        logs = [math.log(one) if one > 0 else -math.inf for one in probs]
        text += (max(range(VOCAB_SIZE), key=lambda token: logs[token] + gumbel[token]),)
    return text


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_output_is_gumbel_max_sampling_for_every_draft(shape: Shape) -> None:
    """For every draft of a shape the output is the reference's text, up to its first token that was not drafted."""
    target = random_distributions(shape.depth + 1, seed=3, zeros=True)
    draft_probs = random_distributions(shape.depth + 1, seed=4)
    rows, used, _ = map(list, zip(*fillings(shape, draft_probs), strict=True))
    draft, target_RNV = draft_of_fillings(shape, rows, used, draft_probs, target)
    outputs = set()
    for seed in range(4):
        noise = PositionNoise([(seed, 2)] * len(rows), [[0] * PROMPT_LENGTH] * len(rows))
        expected = reference(target, seed, 2, shape.depth + 1)
        verdict = coupled.verify(target_RNV, draft, noise)
        for found, nodes, is_used in zip(texts_of(verdict, draft.tokens_BN), rows, used, strict=True):
            assert found == expected[: len(found)]
            drafted = {text for text, in_use in zip(nodes, is_used, strict=True) if in_use}
            assert found[:-1] in drafted and found not in drafted
            outputs.add(found)
    assert len(outputs) > shape.depth, "outputs of several lengths"


def agreement(target_V: Tensor, draft_V: Tensor) -> float:
    """Returns the probability that the draws of two distributions by the same noise are equal (2408.07978)."""
    both = [token for token in range(len(target_V)) if target_V[token] > 0 and draft_V[token] > 0]
    return sum(
        1 / sum(max(target_V[y] / target_V[x], draft_V[y] / draft_V[x]).item() for y in range(len(target_V)))
        for x in both
    )


def test_acceptance_rate_is_the_couplings() -> None:
    num_rows, vocab_size = 4_000, 5
    generator = torch.Generator().manual_seed(0)
    for sharpness in (0.3, 1.5, 4.0):
        target_V, draft_V = (sharpness * torch.randn(2, vocab_size, generator=generator)).softmax(-1)
        noise = PositionNoise([(1, row) for row in range(num_rows)], [[0]] * num_rows)
        drawn_R1 = noise.scores(draft_V.expand(num_rows, 1, -1), [0] * num_rows, range(num_rows)).argmax(-1)
        draft = Draft(
            tokens_BN=torch.cat([torch.zeros_like(drawn_R1), drawn_R1], dim=1),
            tree=chain(2),
            draft_probs_BNV=draft_V.expand(num_rows, 1, -1),
            sampling_scheme="independent",
        )
        verdict = coupled.verify(target_V.expand(num_rows, 2, -1), draft, noise)
        expected, distance = agreement(target_V, draft_V), (target_V - draft_V).abs().sum().item() / 2
        assert (1 - distance) / (1 + distance) <= expected + 1e-6 <= 1 - distance + 2e-6
        deviation = math.sqrt(expected * (1 - expected) / num_rows)
        assert verdict.num_accepted_B.double().mean().item() == pytest.approx(expected, abs=4 * deviation)


# --- Whole systems; every family is checked by `check_family` ------------------------------------------------------


@pytest.mark.parametrize("num_rows", [1, 5])
@pytest.mark.parametrize("settings", [{}, {"temperature": 1.7, "top_k": 40, "top_p": 0.95}])
def test_every_drafter_gives_the_text_of_plain_decoding(num_rows: int, settings: dict[str, float]) -> None:
    target, settings = tiny_target("llama"), SAMPLED | settings
    plain = texts(generate_rows(target, num_rows, **settings))
    assert plain != texts(generate_rows(target, num_rows, **settings | {"seed": 8}))
    drafters = [*(tiny_drafter(name, "llama") for name in ("medusa", "lm", "copy", "lookup"))]
    drafters += [Scripted(target, plain, trees=trees, wrong_every=5) for trees in (True, False)]
    taus = []
    for drafter in drafters:
        out = generate_rows(target, num_rows, drafter, side="left", **settings)
        assert texts(out) == plain
        taus.append(out.stats.tau)
    assert taus[2] > 1.5, "a near copy draws the same tokens by the same noise"
    assert taus[4] > 2, "paths in trees of the right tokens are followed"


@pytest.mark.parametrize("siblings", ["without_replacement", "independent", "top_and_drawn"])
def test_siblings_are_the_largest_scores_of_the_draft_model(siblings: str) -> None:
    target, copy = tiny_target("llama"), tiny_drafter("copy", "llama")
    tree = lm.Drafter(lm.Config(model=copy.config.model, tree=TREE, siblings=siblings), target)
    tree.load_state_dict(copy.state_dict())
    drafts: list[Draft] = []
    propose = tree.propose
    tree.propose = lambda budget: drafts.append(propose(budget)) or drafts[-1]  # type: ignore[method-assign]
    out = generate_rows(target, 3, tree.eval(), **SAMPLED)
    assert texts(out) == texts(generate_rows(target, 3, **SAMPLED))
    assert out.stats.tau > 1.5
    first = drafts[0]
    assert first.draft_probs_BNV is not None
    for row, prompt in enumerate(prompts(3)):
        scores_V = first.draft_probs_BNV[row, 0] / exponentials([(7, row)], [len(prompt)], target.vocab_size)[0]
        assert first.tokens_BN[row, 1:4].tolist() == scores_V.topk(3).indices.tolist()


def test_noise_in_the_order_of_calls_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    """WRONG: fresh noise for each call, as from a generator; drafters then change the text."""
    target = tiny_target("llama")
    generator = torch.Generator()

    def in_order_of_calls(self: PositionNoise, probs_XFV: Tensor, depths: list[int], rows: list[int]) -> Tensor:
        uniforms_X1V = torch.rand(len(probs_XFV), 1, probs_XFV.shape[-1], generator=generator, dtype=torch.float64)
        return probs_XFV / -uniforms_X1V.log()

    monkeypatch.setattr(PositionNoise, "scores", in_order_of_calls)
    found = []
    for name in ("none", "none", "lookup", "copy"):
        generator.manual_seed(7)
        drafter = tiny_drafter(name, "llama") if name != "none" else None
        found.append(texts(generate_rows(target, 1, drafter, **SAMPLED)))
    assert found[0] == found[1] != found[3]


def test_text_continues_as_if_it_had_not_stopped() -> None:
    """Positions count the prompt: the tokens of a text are those of its prompt and seed, wherever a call ended."""
    target, ids = tiny_target("llama"), [prompts(1)[0]]
    whole = draftsmith.generate(target, ids, max_new_tokens=12, **SAMPLED).sequences
    part = draftsmith.generate(target, ids, max_new_tokens=5, **SAMPLED).sequences
    assert torch.equal(draftsmith.generate(target, part, max_new_tokens=7, **SAMPLED).sequences, whole)


def test_seed_per_row_makes_rows_independent_of_the_batch() -> None:
    target, rows, settings = tiny_target("llama"), prompts(3), SAMPLED | {"max_new_tokens": 8}
    drafter = tiny_drafter("copy", "llama")
    together = texts(draftsmith.generate(target, rows, drafter, **settings | {"seed": [3, 9, 2**63]}))
    turned = texts(draftsmith.generate(target, rows[::-1], **settings | {"seed": torch.tensor([2**63 - 2**64, 9, 3])}))
    assert together == turned[::-1]
    for row, seed, text in zip(rows, (3, 9, 2**63), together, strict=True):
        assert texts(draftsmith.generate(target, [row], **settings | {"seed": seed})) == [text]
    same = texts(draftsmith.generate(target, [rows[0]] * 2, **settings))
    assert same[0] != same[1], "rows of one seed have noise of their own"


def test_temperature_0_is_greedy() -> None:
    target = tiny_target("llama")
    greedy = texts(generate_rows(target, 3))
    assert texts(generate_rows(target, 3, verifier="coupled", seed=[1, 2, 3])) == greedy
    assert texts(generate_rows(target, 3, tiny_drafter("copy", "llama"), verifier="coupled")) == greedy


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seed": [1, 2]}, "seed has 2 entries; it must be one seed, or one for each of the 3 rows"),
        (
            {"seed": [1, 2, 3], "verifier": "auto"},
            "seed is a list, a seed for each row, which needs verifier='coupled'",
        ),
        ({"seed": [1, 2, "x"]}, "seed is 'x'; it must be a whole number"),
        ({"seed": [1, 2, 2**64]}, "seed is 18446744073709551616; it must be a whole number of at most 64 bits"),
    ],
)
def test_invalid_seeds_are_rejected(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate_rows(tiny_target("llama"), 3, **SAMPLED | settings)
