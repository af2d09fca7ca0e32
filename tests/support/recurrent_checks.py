"""Checks for drafters that read a text token by token and keep a state (draftsmith/parts/neural/recurrent.py).

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


def check_reading(family: ModuleType, config: Any, architecture: str = "llama") -> None:
    """Checks that a family drafts by its own law after exactly the tokens committed; fails by assertion."""
    drafter = built(family, config, tiny_target(architecture))
    with torch.inference_mode():
        check_steps(drafter)
    train(drafter)
    with torch.inference_mode():
        check_steps(drafter)
        check_that_nothing_is_seen_ahead(drafter)
        if drafter.target.is_encoder_decoder:
            check_source(drafter)
        for seed in range(3):
            check_going_back(drafter, seed)
        check_trees(built(family, dataclasses.replace(config, width=3, num_nodes=9), drafter.target))
        check_weights_that_change(drafter)


def check_shortlist(family: ModuleType, config: Any, trainer: ModuleType, settings: Any, folder: Path) -> None:
    """Checks the family with logits for few tokens alone, which excludes copies of others."""
    config, settings = (dataclasses.replace(one, shortlist=7) for one in (config, settings))
    check_family(family, config, folder, architectures=("llama",), trainer=trainer, settings=settings)
    check_reading(family, config)
    with pytest.raises(ValueError, match="give either copy or a shortlist"):
        dataclasses.replace(config, copy=True)


def check_writing(family: ModuleType, config: Any) -> None:
    """As it is judged on its own text, batch after batch: what it multiplied out for one is there for the next."""
    drafter = built(family, dataclasses.replace(config, width=2), tiny_target("t5"))
    given = {"limits": [6], "seeds": [0], "temperature": 1.0, "source": source_of(drafter.target, 1)}
    written = [on_policy.generate_alone(drafter, drafter.target, [[0]], **given) for _ in range(3)]
    assert written[0] == written[1] == written[2] and len(written[0][0]) == 7
    assert drafter.config.width == 2


def check_run_on_pairs(trainer: ModuleType, settings: Any, folder: Path) -> None:
    """Of an encoder-decoder's own text, and of labels: the loop gives sources, and what it leaves drafts."""
    own = make_data(make_target(folder / "target", "t5"), folder / "data", num_rows=24, max_new_tokens=12)
    labels = folder / "labels.jsonl"
    rows = [{"source": f"w{row} w9 w{row}", "target": f"w{row} w8"} for row in range(3, 27)]
    labels.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for data in (own, labels):
        paths = {"target": str(folder / "target"), "data": str(data), "output": str(folder / f"run-{data.stem}")}
        output = loop.train(trainer, dataclasses.replace(settings, copy=True), RunSettings(**paths, **SMALL))
        check_greedy(draftsmith.load(output, Target.from_pretrained(paths["target"], dtype="float32")), "t5")


def text_of(num_rows: int, length: int) -> Tensor:
    return torch.randint(3, VOCAB_SIZE, (num_rows, length), generator=torch.Generator().manual_seed(length))


def train(drafter: Any) -> None:
    """Takes a step along any gradient, by an optimiser that changes weights behind PyTorch's back."""
    optimiser = torch.optim.AdamW(drafter.train().parameters(), lr=0.01, fused=True)
    for weight in drafter.parameters():
        weight.grad = torch.ones_like(weight)
    optimiser.step()
    drafter.eval()


def check_steps(drafter: Any) -> None:
    """Token by token, from anywhere in ragged rows on, features and logits are those of the whole text at once.

    To a hundred-thousandth of the largest.
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
            for found, whole in ((features_BD, features_BTD), (drafter.logits(features_BD), logits_BTV)):
                torch.testing.assert_close(found, whole[rows_B, at_B], rtol=0, atol=1e-5 * float(whole.abs().max()))


def check_that_nothing_is_seen_ahead(drafter: Any) -> None:
    tokens_BT, source = text_of(2, 30), source_of(drafter.target, 2)
    before = drafter(tokens_BT, source)
    for place in (1, 13, 29):
        other = tokens_BT.clone()
        other[:, place] = (other[:, place] + 1) % VOCAB_SIZE
        after = drafter(other, source)
        torch.testing.assert_close(after[:, :place], before[:, :place], rtol=1e-6, atol=1e-6)
        assert (after[:, place] - before[:, place]).abs().max() > 1e-3, "what it reads makes no difference"


def check_source(drafter: Any) -> None:
    """Every token of a row's source makes a difference to its law, and what pads it none, however long."""
    tokens_BT, source = text_of(5, 12), source_of(drafter.target, 5)
    assert source is not None and 0 < int(source.mask_BT.sum()) < source.mask_BT.numel()
    probs_BTV = drafter.head(source)(drafter(tokens_BT, source)).softmax(-1)
    for place in range(source.tokens_BT.shape[1]):
        states_BSD, tokens_BS = source.encoded_BTD.clone(), source.tokens_BT.clone()
        states_BSD[:, place] = -2 * states_BSD[:, place]
        tokens_BS[:, place] = (tokens_BS[:, place] + 1) % VOCAB_SIZE
        other = Source(tokens_BT=tokens_BS, mask_BT=source.mask_BT, encoded_BTD=states_BSD)
        gaps_B = (drafter.head(other)(drafter(tokens_BT, other)).softmax(-1) - probs_BTV).abs().amax((1, 2))
        is_text_B = source.mask_BT[:, place] > 0
        assert (gaps_B[is_text_B] > 1e-3).all(), "what it reads makes no difference"
        assert (gaps_B[~is_text_B] < 1e-6).all(), "padding makes a difference"
    longer = Source(**{name: torch.cat([tensor, tensor], dim=1) for name, tensor in vars(source).items()})
    longer.mask_BT[:, source.mask_BT.shape[1] :] = 0
    torch.testing.assert_close(drafter.head(longer)(drafter(tokens_BT, longer)).softmax(-1), probs_BTV)


def check_going_back(drafter: Any, seed: int) -> None:
    """After any acceptance, plain steps, other drafters' drafts and texts taken back, laws are those of a fresh run."""
    chance, sampling = random.Random(seed), Sampling(temperature=1.0)
    session = begin(drafter, [list(row) for row in prompts(5, seed=seed)], sampling)
    rows, ends = session.rows, {4: chance.randrange(3, NUM_ROUNDS)}
    least = [len(row) - 1 for row in rows]
    for number in range(NUM_ROUNDS):
        draft = drafter.propose(chance.choice((1, 3, 9)))
        assert draft.tree.is_chain and draft.draft_probs_BNV is not None
        for row, ids in enumerate(rows):
            text = ids + draft.tokens_BN[row, 1:].tolist()
            probs_NV = sampling.probs(fresh_logits(drafter, text, row)[len(ids) - 1 : -1])
            torch.testing.assert_close(draft.draft_probs_BNV[row], probs_NV, rtol=1e-4, atol=1e-5)
        kind = chance.choice(("own", "own", "own", "cut", "foreign", "plain", "back"))
        draft = other_draft(kind, draft, rows)
        paths = []
        for row, ids in enumerate(rows):
            if row in ends and number >= ends[row]:
                paths.append([])
                continue
            deepest = draft.num_nodes[row] - 1 if draft.num_nodes else draft.tree.depth
            path = list(range(1 + chance.randint(0, deepest)))
            new = [*(int(draft.tokens_BN[row, node]) for node in path[1:]), chance.randrange(3, VOCAB_SIZE)]
            # A row that ends may keep less than was accepted.
            ids += new[:1] if ends.get(row) == number + 1 else new
            paths.append(path)
        nothing = torch.zeros(0)
        given = {"logits_BNV": nothing, "hidden": {}, "verdict": None, "cost_ms": 1.0}
        drafter.observe(Step(draft=draft, paths=paths, **given))  # type: ignore[arg-type]
        if kind == "back":
            lengths = [max(len(ids) - 1 - chance.randrange(6), prompt) for ids, prompt in zip(rows, least, strict=True)]
            drafter.rewind(lengths)
            for ids, length in zip(rows, lengths, strict=True):
                ids[length:] = [chance.randrange(3, VOCAB_SIZE) for _ in range(chance.randrange(1, 4))]


def check_trees(drafter: Any) -> None:
    """Trees that grow are those of a model that reads each node's whole path anew."""
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


def check_weights_that_change(drafter: Any) -> None:
    """What is multiplied out for drafting follows the weights."""
    laws = []
    for _ in range(2):
        begin(drafter, [[5, 6, 7]], Sampling(temperature=1.0))
        laws.append(drafter.propose(1).draft_probs_BNV[0, 0])
        expected_V = fresh_logits(drafter, [5, 6, 7])[-1].softmax(-1)
        torch.testing.assert_close(laws[-1], expected_V, rtol=1e-4, atol=1e-5)
        for weight in drafter.parameters():
            weight.mul_(0.5)
    assert (laws[0] - laws[1]).abs().max() > 1e-3


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
    """Returns [T, V] of one parallel pass, the row's source without padding."""
    source = source_of(drafter.target, row + 1)
    if source is not None:
        length = int(source.mask_BT[row].sum())
        source = Source(**{name: tensor[row : row + 1, :length] for name, tensor in vars(source).items()})
    return drafter.head(source)(drafter(torch.tensor([ids]), source))[0]


def source_of(target: Target, num_rows: int) -> Source | None:
    """Returns sources of unequal lengths, row by row the same ones however many, or None for a causal target."""
    return target.encode(*padded(prompts(num_rows, seed=31))) if target.is_encoder_decoder else None


def other_draft(kind: str, draft: Draft, rows: list[list[int]]) -> Draft:
    """Returns the draft that is verified in place of one proposed."""
    if kind == "cut":
        return dataclasses.replace(draft, num_nodes=[1 + row % draft.tree.num_nodes for row in range(len(rows))])
    if kind not in ("foreign", "plain"):
        return draft
    pending_B1 = torch.tensor([[ids[-1]] for ids in rows])
    tokens_BN = torch.cat([pending_B1, text_of(len(rows), 5)], dim=1) if kind == "foreign" else pending_B1
    return Draft(tokens_BN=tokens_BN, tree=chain(tokens_BN.shape[1]))
