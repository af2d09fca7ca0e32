"""Tests of Token Recycling: the matrix against a dictionary, trees with unknown tokens, and the trained start."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as some
from safetensors.torch import load_file, save_file
from torch import Tensor

import draftsmith
from data.batches import collate, example, order, split
from data.pseudo_data import read_pseudo_data
from data.shards import write_atomically
from data.teacher import complete
from draftsmith import Target
from draftsmith.core.drafter import Session, Step
from draftsmith.core.tree import Draft
from draftsmith.drafters import recycling
from draftsmith.drafters.recycling import TREE, Config, Drafter, static_tree
from tests.support import runs
from tests.support.family import Alternating, Watched, check_family, texts
from tests.support.models import SEQ2SEQ, VOCAB_SIZE, greedy_by_transformers, padded, prompts, tiny_target
from tests.support.runs import make_data, make_target, trainer_settings
from trainers import recycling as trainer
from trainers.corpora import corpus
from trainers.training.loop import train

SMALL = Config(num_successors=4, tree=static_tree((4, 5, 3), 4))
EXAMPLE = SMALL


def test_family(tmp_path: Path) -> None:
    check_family(recycling, SMALL, tmp_path)


def test_static_tree_has_the_papers_levels() -> None:
    assert [sum(len(path) == depth for path in TREE) for depth in range(1, 8)] == [8, 21, 25, 15, 8, 3, 0]
    assert static_tree((3, 4), 3) == ((0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 2)), "products 1, 2, 2, 3"
    assert set(static_tree((2, 2), 2)) == {(0,), (1,), (0, 0), (0, 1)}


# --- The matrix ----------------------------------------------------------------------------------------------------


class Compared(Watched):
    """Keeps successors in dictionaries, token by token, and compares matrix and drafts with them in every step."""

    def start(self, session: Session) -> None:
        matrix = self.inner.successors.tolist()
        self.later = {token: row for token, row in enumerate(matrix[:VOCAB_SIZE]) if row[0] < VOCAB_SIZE}
        self.own = [dict(self.later) for _ in session.rows]
        super().start(session)
        for row, ids in enumerate(session.rows):
            if len(ids) > 1:
                for token, logits_V in zip(ids, self.target.model(torch.tensor([ids[:-1]])).logits[0], strict=False):
                    self.learn(row, token, logits_V)
        self.compare()

    def learn(self, row: int, token: int, logits_V: Tensor) -> None:
        best = logits_V.argsort(descending=True)[: self.config.num_successors].tolist()
        self.own[row][token] = self.later[token] = best

    def compare(self) -> None:
        for known, matrix_VK in zip(
            [self.later, *self.own], [self.inner.successors, *self.inner._own_BVK], strict=True
        ):
            unknown = [VOCAB_SIZE] * self.config.num_successors
            assert matrix_VK.tolist() == [known.get(token, unknown) for token in range(VOCAB_SIZE + 1)]

    def propose(self, budget: int) -> Draft:
        draft = super().propose(budget)
        paths = [path for path in self.config.tree if len(path) <= budget]
        for row, pending in enumerate(ids[-1] for ids in self._session.rows):
            expected: dict[tuple[int, ...], int] = {(): pending}
            for path in sorted(paths, key=lambda path: (len(path), path)):
                above = expected.get(path[:-1])
                if above in self.own[row]:
                    expected[path] = self.own[row][above][path[-1]]
            assert sorted(drafted_paths(draft, row)) == sorted(
                tuple(expected[path[:end]] for end in range(1, len(path) + 1)) for path in expected if path
            )
        return draft

    def observe(self, step: Step) -> None:
        super().observe(step)
        fed = []
        for row, path in enumerate(step.paths):
            used = step.draft.num_nodes[row] if step.draft.num_nodes else step.draft.tree.num_nodes
            accepted = set(step.verdict.path_BP[row].tolist())
            depths = step.draft.tree.depths_RN.expand(len(step.paths), -1)[row].tolist()
            fed += [(node in accepted, depths[node], row, node) for node in range(used) if path]
        for _, _, row, node in sorted(fed):
            self.learn(row, int(step.draft.tokens_BN[row, node]), step.logits_BNV[row, node])
        self.compare()


def drafted_paths(draft: Draft, row: int) -> list[tuple[int, ...]]:
    """Returns the tokens on the path to each node, without padding."""
    parents = draft.tree.parents_RN.expand(len(draft.tokens_BN), -1)[row].tolist()
    tokens = draft.tokens_BN[row].tolist()
    paths: list[tuple[int, ...]] = [()]
    for node in range(1, draft.num_nodes[row] if draft.num_nodes else len(tokens)):
        paths.append((*paths[parents[node]], tokens[node]))
    return paths[1:]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("num_rows", [1, 5])
def test_drafts_and_matrix_equal_the_dictionaries(num_rows: int, temperature: float) -> None:
    target = tiny_target("llama")
    drafter = Drafter(SMALL, target)
    for seed in range(2):
        ids, mask = padded(prompts(num_rows, seed=seed))
        watched = Compared(drafter)
        given = {"temperature": temperature, "seed": seed}
        draftsmith.generate(target, ids, watched, attention_mask=mask, max_new_tokens=20, **given)  # type: ignore[arg-type]
        assert watched.num_drafted > 0


def test_matrix_learns_from_other_drafts() -> None:
    target = tiny_target("llama")
    ids, mask = padded(prompts(5))
    out = draftsmith.generate(
        target,
        ids,
        Alternating(Compared(Drafter(SMALL, target))),
        attention_mask=mask,
        max_new_tokens=20,
        eos_token_id=[9, 30],
    )
    plain = draftsmith.generate(target, ids, attention_mask=mask, max_new_tokens=20, eos_token_id=[9, 30])
    assert texts(out) == texts(plain)


def test_repeated_token_gets_the_successors_of_its_deepest_accepted_node() -> None:
    """By hand: a chain 5, 5, 5, 5 of which two tokens are accepted, and a row that has finished."""
    target = tiny_target("llama")
    drafter = Drafter(Config(num_successors=2, tree=((0,), (1,))), target)
    logits_BNV = torch.zeros(2, 4, VOCAB_SIZE)
    for row in range(2):
        for node in range(4):
            logits_BNV[row, node, 10 * row + node] = 2
            logits_BNV[row, node, 20 + node] = 1
    tree = draftsmith.core.tree.chain(4)
    verdict: Any = type("Verdict", (), {"path_BP": torch.tensor([[0, 1, 2, 2], [0, 1, 2, 2]])})()

    def observed(
        tokens: list[list[int]], paths: list[list[int]], num_nodes: list[int] | None = None
    ) -> list[list[int]]:
        drafter.successors.fill_(VOCAB_SIZE)
        drafter.start(fake_session(target, [[9], [9]]))
        draft = Draft(tokens_BN=torch.tensor(tokens), tree=tree, num_nodes=num_nodes)
        drafter.observe(Step(draft=draft, logits_BNV=logits_BNV, hidden={}, verdict=verdict, paths=paths, cost_ms=0.0))
        return [drafter.successors[token].tolist() for token in (5, 6)]

    none = [VOCAB_SIZE, VOCAB_SIZE]
    assert observed([[5] * 4, [6] * 4], [[0, 1, 2], []]) == [[2, 22], none]
    assert observed([[5] * 4, [5] * 4], [[0, 1, 2], [0, 1, 2]]) == [[12, 22], none], "of two rows the last one counts"
    assert observed([[6, 6, 6, 5], [6] * 4], [[0, 1, 2], []]) == [[3, 23], [2, 22]], "rejected nodes count, too"
    assert observed([[6, 6, 6, 5], [6] * 4], [[0, 1, 2], []], [3, 4]) == [none, [2, 22]], "padding does not count"


def fake_session(target: Target, rows: list[list[int]]) -> Any:
    """Returns a session without hidden states of the prompt."""
    session: Any = type("Rows", (), {"target": target, "rows": rows, "hidden": {}})()
    session.pending = lambda: Session.pending(session)
    return session


# --- Drafts --------------------------------------------------------------------------------------------------------


def test_unknown_successors_are_left_out() -> None:
    target = tiny_target("llama")
    drafter = Drafter(Config(num_successors=2, tree=((0,), (1,), (0, 0), (1, 0), (1, 1))), target)
    drafter.successors[3] = torch.tensor([0, 4])
    drafter.successors[4] = torch.tensor([3, 0])
    session = fake_session(target, [[9, 3], [4], [8]])
    drafter.start(session)
    draft = drafter.propose(5)
    assert draft.num_nodes == [5, 4, 1]
    assert [sorted(drafted_paths(draft, row)) for row in range(3)] == [
        [(0,), (4,), (4, 0), (4, 3)],
        [(0,), (3,), (3, 0)],
        [],
    ]
    assert drafter.propose(1).num_nodes == [3, 3, 1]
    drafter.start(fake_session(target, [[8], [7]]))
    assert drafter.propose(5).tree.num_nodes == 1


@pytest.mark.parametrize("architecture", SEQ2SEQ)
def test_encoder_decoder_gets_the_chain_of_first_successors(architecture: str) -> None:
    target = tiny_target(architecture)
    ids, mask = padded(prompts(5))
    plain = texts(draftsmith.generate(target, ids, attention_mask=mask, max_new_tokens=20))
    drafter = Watched(Drafter(SMALL, target))
    for _ in range(2):
        out = draftsmith.generate(target, ids, drafter, attention_mask=mask, max_new_tokens=20)
        assert texts(out) == plain and out.stats.drafted
    assert len(out.stats.drafted) == 3, "the depth of the tree"


def test_later_calls_use_the_successors_learnt_in_earlier_ones(tmp_path: Path) -> None:
    target = tiny_target("llama")
    ids, mask = padded(prompts(5))
    drafter = Drafter(SMALL, target)

    def steps(one: Drafter) -> int:
        return draftsmith.generate(target, ids, one, attention_mask=mask, max_new_tokens=20).stats.steps

    first = steps(drafter)
    draftsmith.save(drafter, tmp_path / "artifact", target)
    loaded = draftsmith.load(tmp_path / "artifact", target)
    assert loaded.successors.equal(drafter.successors)
    assert steps(drafter) == steps(loaded) < first


def test_load_rejects_an_invalid_matrix(tmp_path: Path) -> None:
    target = tiny_target("llama")
    draftsmith.save(Drafter(SMALL, target), tmp_path / "artifact", target)
    file = tmp_path / "artifact" / "model.safetensors"
    whole, matrix_VK = file.read_bytes(), load_file(file)["successors"]
    for odd in (matrix_VK + 1, matrix_VK - VOCAB_SIZE - 1):
        save_file({"successors": odd}, file)
        with pytest.raises(ValueError, match="the stored successors are not all ids below 64"):
            draftsmith.load(tmp_path / "artifact", target)
    file.write_bytes(whole[:-9])
    with pytest.raises(ValueError, match=r"model.safetensors is truncated"):
        draftsmith.load(tmp_path / "artifact", target)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_successors": 0, "tree": ((0,),)}, "num_successors is 0; it must be at least 1"),
        ({"tree": ()}, "the tree has no nodes"),
        ({"num_successors": 4}, "a tree node has rank 7; with num_successors 4 ranks are smaller than that"),
        ({"tree": ((0,), (1, 0))}, r"tree node \[1, 0\] needs node \[1\]"),
    ],
)
def test_config_rejects_invalid_settings(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config(**changes)


def test_drafter_rejects_more_successors_than_tokens() -> None:
    with pytest.raises(ValueError, match="num_successors is 65; the target's vocabulary has 64 tokens"):
        Drafter(Config(num_successors=65, tree=((0,),)), tiny_target("llama"))
    for changes in ({"num_successors": 0}, {"tree_nodes": -1}):
        with pytest.raises(ValueError, match="must"):
            trainer_settings(trainer, **changes)


# --- The trainer ---------------------------------------------------------------------------------------------------

PAIRS = some.lists(some.lists(some.tuples(some.integers(0, 3), some.integers(0, 3), some.integers(1, 5)), max_size=9))


@hypothesis_settings(max_examples=60, deadline=None)
@given(PAIRS, some.integers(1, 3))
def test_sum_weights_and_heaviest_pairs_equal_a_dictionary(
    parts: list[list[tuple[int, int, int]]], num_kept: int
) -> None:
    coded = [
        (np.array([4 * one + other for one, other, _ in part], np.int64), np.array([float(w) for *_, w in part]))
        for part in parts
    ]
    sums: dict[int, dict[int, float]] = {}
    for token, successor, weight in (pair for part in parts for pair in part):
        sums.setdefault(token, {}).setdefault(successor, 0.0)
        sums[token][successor] += weight
    expected = [
        (4 * token + successor, weight)
        for token, found in sorted(sums.items())
        for successor, weight in sorted(found.items(), key=lambda pair: (-pair[1], pair[0]))[:num_kept]
    ]
    codes_N, weights_N = trainer.heaviest_pairs(*trainer.sum_weights(coded), 4, num_kept)
    assert list(zip(codes_N.tolist(), weights_N.tolist(), strict=True)) == expected


def slow_ranks(successors_VK: Tensor, tokens: list[int], mask: list[bool], top_TK: Tensor) -> list[list[int]]:
    """Returns the ranks [T, D], each found by a scan of the text before the pending token."""
    ranks = [[-1] * trainer.DEPTH for _ in tokens]
    for at in range(len(tokens)):
        for position in range(at, min(at + trainer.DEPTH, len(tokens) - 1)):
            before = [one for one in range(at) if tokens[one] == tokens[position]]
            kept = top_TK[before[-1]] if before else successors_VK[tokens[position]]
            correct = (kept == tokens[position + 1]).nonzero()
            if mask[position + 1]:
                ranks[at][position - at] = int(correct[0]) if len(correct) else len(kept)
    return ranks


def test_successor_ranks_equal_the_slow_reference() -> None:
    target = tiny_target("llama")
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(12, (length,), generator=generator).tolist() for length in (30, 12)]
    masks = [(torch.rand(len(row), generator=generator) < 0.8).tolist() for row in rows]
    batch = complete(
        collate([example(row, mask, str(at)) for at, (row, mask) in enumerate(zip(rows, masks, strict=True))]),
        target,
        top_k=8,
    )
    successors_VK = torch.randint(12, (VOCAB_SIZE + 1, 8), generator=generator, dtype=torch.int32)
    found_DBT = trainer.successor_ranks(successors_VK, batch)
    for at, (row, mask) in enumerate(zip(rows, masks, strict=True)):
        assert batch.top_ids_BTK is not None
        expected = slow_ranks(successors_VK, row, mask, batch.top_ids_BTK[at])
        assert found_DBT[:, at, : len(row)].T.tolist() == expected
        assert any(0 < rank < 8 for ranks in expected for rank in ranks)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny target in `target` and its text in `data`."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("recycling")
    make_data(make_target(root / "target"), root / "data")
    return root


run_settings = partial(runs.run_settings, max_steps=8, batch_size=4)


def test_resumed_run_gives_the_same_bytes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The successors are those of the largest sums of the target's probabilities over the rows."""
    monkeypatch.setattr(trainer, "BATCHES_PER_CHUNK", 2)
    chosen = trainer_settings(trainer, num_successors=3, tree_nodes=9)
    whole = train(trainer, chosen, run_settings(folder, "whole"))
    made: list[str] = []

    def interrupted_write(path: Path, *given: Any) -> None:
        if path.name == "0002.safetensors":
            raise KeyboardInterrupt
        made.append(path.name)
        write_atomically(path, *given)

    monkeypatch.setattr(corpus, "write_atomically", interrupted_write)
    with pytest.raises(KeyboardInterrupt):
        train(trainer, chosen, run_settings(folder, "broken"))
    monkeypatch.setattr(corpus, "write_atomically", write_atomically)
    broken = train(trainer, chosen, run_settings(folder, "broken"))
    assert made == ["0000.safetensors", "0001.safetensors"]
    assert (whole / "model.safetensors").read_bytes() == (broken / "model.safetensors").read_bytes()
    target = Target.from_pretrained(str(folder / "target"), dtype="float32")
    drafter = draftsmith.load(whole, target)
    assert 1 <= len(drafter.config.tree) <= 9 and drafter.config.num_successors == 3
    check_successors(drafter.successors, target, folder)


def check_successors(successors_VK: Tensor, target: Target, folder: Path) -> None:
    rows = read_pseudo_data(folder / "data")
    train_on, _ = split(rows.keys, held_out_share=0.05, seed=0)
    sums_VV = torch.zeros(VOCAB_SIZE, VOCAB_SIZE, dtype=torch.float64)
    for index in order(len(train_on), seed=0, epoch=0)[:32]:
        row = rows[train_on[index]]
        with torch.no_grad():
            probs_TV = target.model(row.tokens_T[None]).logits[0].double().softmax(-1)
        for token, follows, probs_V in zip(row.tokens_T[:-1], row.loss_mask_T[1:], probs_TV, strict=False):
            if follows:
                best = probs_V.topk(3)
                sums_VV[token, best.indices] += best.values
    for token in range(VOCAB_SIZE):
        # Rounding may exchange sums, or the third and fourth token of a position, that are nearly equal.
        padded_V = torch.cat([sums_VV[token], torch.zeros(1, dtype=torch.float64)])
        chosen = successors_VK[token].tolist()
        assert len({one for one in chosen if one < VOCAB_SIZE}) == sum(one < VOCAB_SIZE for one in chosen)
        torch.testing.assert_close(padded_V[chosen], sums_VV[token].topk(3).values, rtol=0.05, atol=1e-3)


def test_evaluation_leaves_the_matrix_unchanged() -> None:
    target = tiny_target("llama")
    drafter = Drafter(SMALL, target)
    rows = [example(ids, None, str(at)) for at, ids in enumerate(greedy_by_transformers("llama", 2, 20))]
    metrics = trainer.evaluate(drafter, collate(rows), trainer.Settings(), target)
    assert metrics["acceptance"][0] > 0
    assert int((drafter.successors < VOCAB_SIZE).sum()) == 0
