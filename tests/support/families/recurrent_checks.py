"""Checks for drafters with a recurrent state (draftsmith/parts/neural/recurrent.py).

Shape suffixes: B rows, T tokens, N nodes, D width of the features, V vocabulary.
"""

import dataclasses
import json
import random
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import draftsmith
from draftsmith import Target
from draftsmith.core.drafter import Session, Step
from draftsmith.core.sampling import Sampling
from draftsmith.core.target import Source
from draftsmith.core.tree import Draft, Tree, chain
from draftsmith.parts import autoregressive
from tests.support.family import built, check_family, check_greedy
from tests.support.models import VOCAB_SIZE, padded, prompts, tiny_target
from tests.support.runs import SMALL, make_data, make_target
from trainers.parts import on_policy
from trainers.training import loop
from trainers.training.run_settings import RunSettings

NUM_ROUNDS = 12


def check_recurrent(family: ModuleType, config: Any, architecture: str = "llama") -> None:
    """Asserts that a family's draft distributions are those after exactly the committed tokens."""
    drafter = built(family, config, tiny_target(architecture))
    with torch.inference_mode():
        check_steps(drafter)
    train(drafter)
    with torch.inference_mode():
        check_steps(drafter)
        check_causality(drafter)
        if drafter.target.is_encoder_decoder:
            check_source(drafter)
        for seed in range(3):
            check_rewinding(drafter, seed)
        check_trees(built(family, dataclasses.replace(config, width=3, num_nodes=9), drafter.target))
        check_changed_weights(drafter)


def check_shortlist(family: ModuleType, config: Any, trainer: ModuleType, settings: Any, folder: Path) -> None:
    """Checks the family with a shortlist of tokens, which excludes the copy mechanism."""
    config = dataclasses.replace(config, shortlist=7)
    settings = dataclasses.replace(settings, config=dataclasses.replace(settings.config, shortlist=7))
    check_family(family, config, folder, architectures=("llama",), trainer=trainer, settings=settings)
    check_recurrent(family, config)
    with pytest.raises(ValueError, match="give either copy or a shortlist"):
        dataclasses.replace(config, copy=True)


def check_on_policy(family: ModuleType, config: Any) -> None:
    """Asserts that on-policy text stays the same from batch to batch: cached products must remain valid."""
    drafter = built(family, dataclasses.replace(config, width=2), tiny_target("t5"))
    given = {"limits": [6], "seeds": [0], "temperature": 1.0, "source": source_of(drafter.target, 1)}
    written = [on_policy.generate_alone(drafter, drafter.target, [[0]], **given) for _ in range(3)]
    assert written[0] == written[1] == written[2] and len(written[0][0]) == 7
    assert drafter.config.width == 2


def check_run_on_pairs(trainer: ModuleType, settings: Any, folder: Path) -> None:
    """Trains for an encoder-decoder on its own text and on labels, and checks the drafters that result."""
    own = make_data(make_target(folder / "target", "t5"), folder / "data", num_rows=24, max_new_tokens=12)
    labels = folder / "labels.jsonl"
    rows = [{"source": f"w{row} w9 w{row}", "target": f"w{row} w8"} for row in range(3, 27)]
    labels.write_text("".join(json.dumps(row) + "\n" for row in rows))
    copying = dataclasses.replace(settings, config=dataclasses.replace(settings.config, copy=True))
    for data in (own, labels):
        paths = {"target": str(folder / "target"), "data": str(data), "output": str(folder / f"run-{data.stem}")}
        output = loop.train(trainer, copying, RunSettings(**paths, **SMALL))
        check_greedy(draftsmith.load(output, Target.from_pretrained(paths["target"], dtype="float32")), "t5")


def text_of(num_rows: int, length: int) -> Tensor:
    return torch.randint(3, VOCAB_SIZE, (num_rows, length), generator=torch.Generator().manual_seed(length))


def train(drafter: Any) -> None:
    """Takes an optimiser step; a fused optimiser changes weights without bumping PyTorch's version counters."""
    optimiser = torch.optim.AdamW(drafter.train().parameters(), lr=0.01, fused=True)
    for weight in drafter.parameters():
        weight.grad = torch.ones_like(weight)
    optimiser.step()
    drafter.eval()


def check_steps(drafter: Any) -> None:
    """Asserts that features and logits token by token, from any position of ragged rows, equal a parallel pass.

    The tolerance is 1e-5 of the largest value.
    """
    tokens_BT, source = text_of(4, 40), source_of(drafter.target, 4)
    features_BTD = drafter(tokens_BT, source)
    logits_BTV = drafter.head(source)(features_BTD)
    begin(drafter, [[1]] * 4)
    for lengths in ([0, 0, 0, 0], [0, 1, 7, 20], [3, 40, 2, 1]):
        state = drafter.read(tokens_BT[:, : max(*lengths, 1)], lengths)
        for step in range(40 - max(lengths)):
            at_B = torch.tensor(lengths) + step
            rows_B = torch.arange(4)
            features_BD, state = drafter.step(tokens_BT[rows_B, at_B], state)
            logits_BV = drafter.vocabulary.spread(drafter.logits(features_BD))
            for found, whole in ((features_BD, features_BTD), (logits_BV, logits_BTV)):
                torch.testing.assert_close(found, whole[rows_B, at_B], rtol=0, atol=1e-5 * float(whole.abs().max()))


def check_causality(drafter: Any) -> None:
    tokens_BT, source = text_of(2, 30), source_of(drafter.target, 2)
    before = drafter(tokens_BT, source)
    for position in (1, 13, 29):
        other = tokens_BT.clone()
        other[:, position] = (other[:, position] + 1) % VOCAB_SIZE
        after = drafter(other, source)
        torch.testing.assert_close(after[:, :position], before[:, :position], rtol=1e-6, atol=1e-6)
        assert (after[:, position] - before[:, position]).abs().max() > 1e-3, "the input has no effect"


def check_source(drafter: Any) -> None:
    """Asserts that every token of a row's source affects its distributions, and padding of any length does not."""
    tokens_BT, source = text_of(5, 12), source_of(drafter.target, 5)
    assert source is not None and 0 < int(source.mask_BT.sum()) < source.mask_BT.numel()
    probs_BTV = drafter.head(source)(drafter(tokens_BT, source)).softmax(-1)
    for position in range(source.tokens_BT.shape[1]):
        states_BSD, tokens_BS = source.encoded_BTD.clone(), source.tokens_BT.clone()
        states_BSD[:, position] = -2 * states_BSD[:, position]
        tokens_BS[:, position] = (tokens_BS[:, position] + 1) % VOCAB_SIZE
        other = Source(tokens_BT=tokens_BS, mask_BT=source.mask_BT, encoded_BTD=states_BSD)
        gaps_B = (drafter.head(other)(drafter(tokens_BT, other)).softmax(-1) - probs_BTV).abs().amax((1, 2))
        is_text_B = source.mask_BT[:, position] > 0
        assert (gaps_B[is_text_B] > 1e-3).all(), "the input has no effect"
        assert (gaps_B[~is_text_B] < 1e-6).all(), "padding has an effect"
    longer = Source(**{name: torch.cat([tensor, tensor], dim=1) for name, tensor in vars(source).items()})
    longer.mask_BT[:, source.mask_BT.shape[1] :] = 0
    torch.testing.assert_close(drafter.head(longer)(drafter(tokens_BT, longer)).softmax(-1), probs_BTV)


def check_rewinding(drafter: Any, seed: int) -> None:
    """Asserts that after any steps, cut and foreign drafts and rewinds, distributions equal those of a fresh run."""
    rng, sampling = random.Random(seed), Sampling(temperature=1.0)
    session = begin(drafter, [list(row) for row in prompts(5, seed=seed)], sampling)
    rows, ends = session.rows, {4: rng.randrange(3, NUM_ROUNDS)}
    least = [len(row) - 1 for row in rows]
    for number in range(NUM_ROUNDS):
        draft = drafter.propose(rng.choice((1, 3, 9)))
        assert draft.tree.is_chain and draft.draft_probs_BNV is not None
        for row, ids in enumerate(rows):
            text = ids + draft.tokens_BN[row, 1:].tolist()
            probs_NV = sampling.probs(fresh_logits(drafter, text, row)[len(ids) - 1 : -1])
            torch.testing.assert_close(draft.draft_probs_BNV[row], probs_NV, rtol=1e-4, atol=1e-5)
        kind = rng.choice(("own", "own", "own", "cut", "foreign", "plain", "rewind"))
        draft = other_draft(kind, draft, rows)
        paths = []
        for row, ids in enumerate(rows):
            if row in ends and number >= ends[row]:
                paths.append([])
                continue
            deepest = draft.num_nodes[row] - 1 if draft.num_nodes else draft.tree.depth
            path = list(range(1 + rng.randint(0, deepest)))
            new = [*(int(draft.tokens_BN[row, node]) for node in path[1:]), rng.randrange(3, VOCAB_SIZE)]
            # A row that finishes may keep fewer tokens than were accepted.
            ids += new[:1] if ends.get(row) == number + 1 else new
            paths.append(path)
        nothing = torch.zeros(0)
        given = {"logits_BNV": nothing, "hidden": {}, "verdict": None, "cost_ms": 1.0}
        drafter.observe(Step(draft=draft, paths=paths, **given))  # type: ignore[arg-type]
        if kind == "rewind":
            lengths = [max(len(ids) - 1 - rng.randrange(6), prompt) for ids, prompt in zip(rows, least, strict=True)]
            drafter.rewind(lengths)
            for ids, length in zip(rows, lengths, strict=True):
                ids[length:] = [rng.randrange(3, VOCAB_SIZE) for _ in range(rng.randrange(1, 4))]


def check_trees(drafter: Any) -> None:
    """Asserts that dynamic trees equal those of a model that reads each node's whole path."""
    for rows in ([[5, 6, 7]], prompts(5)):
        session = begin(drafter, [list(row) for row in rows])

        def fresh(tokens_BN: Tensor, tree: Tree, first: int, rows: list[list[int]] = session.rows) -> Tensor:
            logits = []
            for row, ids in enumerate(rows):
                ancestors_NN = tree.ancestors_RNN[row % len(tree.ancestors_RNN)]
                for node in range(first, tree.num_nodes):
                    path = tokens_BN[row, ancestors_NN[node]].tolist()
                    logits.append(fresh_logits(drafter, ids[:-1] + path, row)[-1])
            return torch.stack(logits).unflatten(0, (len(rows), -1))

        expected = autoregressive.draft(fresh, session, drafter.config, 4)
        found = drafter.propose(4)
        assert torch.equal(found.tokens_BN, expected.tokens_BN)
        assert torch.equal(found.tree.parents_RN, expected.tree.parents_RN)


def check_changed_weights(drafter: Any) -> None:
    """Asserts that cached products follow changes of the weights."""
    probs = []
    for _ in range(2):
        begin(drafter, [[5, 6, 7]], Sampling(temperature=1.0))
        probs.append(drafter.propose(1).draft_probs_BNV[0, 0])
        expected_V = fresh_logits(drafter, [5, 6, 7])[-1].softmax(-1)
        torch.testing.assert_close(probs[-1], expected_V, rtol=1e-4, atol=1e-5)
        for weight in drafter.parameters():
            weight.mul_(0.5)
    assert (probs[0] - probs[1]).abs().max() > 1e-3


def begin(drafter: Any, rows: list[list[int]], sampling: Sampling | None = None) -> Session:
    target: Target = drafter.target
    session = Session(
        target=target,
        rows=rows,
        cache=target.new_cache(len(rows)),
        sampling=sampling or Sampling(),
        generator=torch.Generator().manual_seed(0),
        source=source_of(target, len(rows)),
    )
    drafter.start(session)
    return session


def fresh_logits(drafter: Any, ids: list[int], row: int = 0) -> Tensor:
    """Returns the logits [T, V] of one parallel pass, with the row's source unpadded."""
    source = source_of(drafter.target, row + 1)
    if source is not None:
        length = int(source.mask_BT[row].sum())
        source = Source(**{name: tensor[row : row + 1, :length] for name, tensor in vars(source).items()})
    return drafter.head(source)(drafter(torch.tensor([ids]), source))[0]


def source_of(target: Target, num_rows: int) -> Source | None:
    """Returns sources of unequal lengths, the same for any number of rows; None for a causal target."""
    return target.encode(*padded(prompts(num_rows, seed=31))) if target.is_encoder_decoder else None


def other_draft(kind: str, draft: Draft, rows: list[list[int]]) -> Draft:
    """Returns the draft that is verified instead of the proposed one."""
    if kind == "cut":
        return dataclasses.replace(draft, num_nodes=[1 + row % draft.tree.num_nodes for row in range(len(rows))])
    if kind not in ("foreign", "plain"):
        return draft
    pending_B1 = torch.tensor([[ids[-1]] for ids in rows])
    tokens_BN = torch.cat([pending_B1, text_of(len(rows), 5)], dim=1) if kind == "foreign" else pending_B1
    return Draft(tokens_BN=tokens_BN, tree=chain(tokens_BN.shape[1]))
