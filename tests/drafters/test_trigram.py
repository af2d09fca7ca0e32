"""Tests of tri-gram drafts: the rows' own tri-grams, the makers, and the table; the search is tested beside it."""

import itertools
import mmap
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import draftsmith
from draftsmith.core.tree import Draft
from draftsmith.drafters import trigram
from draftsmith.drafters.trigram import Config, Drafter
from tests.support.distributions import check_distribution, distribution_target
from tests.support.families.trigram_reference import Weights, add_trigrams, extend_paths, search, table_of
from tests.support.family import Watched, check_family, texts
from tests.support.models import SEQ2SEQ, VOCAB_SIZE, greedy_by_transformers, padded, prompts, tiny_target

EXAMPLE = Config(num_iterations=20, num_sequences=6, num_nodes=7)


def test_family(tmp_path: Path) -> None:
    check_family(trigram, EXAMPLE, tmp_path)


# --- The drafter -------------------------------------------------------------------------------------------------


def own_text(target: Any) -> list[list[int]]:
    return greedy_by_transformers("llama", 5, 20) if target is tiny_target("llama") else []


def filled_drafter(config: Config, target: Any) -> Drafter:
    """Returns a drafter whose table has the target's greedy text and random text."""
    known: Weights = {}
    for text in [*own_text(target), *prompts(5, seed=4)]:
        add_trigrams(known, text, 0.125, 1.0)
    return Drafter(config, target, table_of(known, target.vocab_size))


class Compared(Watched):
    """Compares each draft with the slow reference, and replaces every second one by a plain step."""

    def start(self, session: Any) -> None:
        super().start(session)
        table = self.inner.table
        spans = list(itertools.pairwise(table.begins_K.tolist()))
        self.known = [
            {
                divmod(key, VOCAB_SIZE): dict(
                    zip(table.tokens_S[a:b].tolist(), table.weights_S[a:b].tolist(), strict=True)
                )
                for key, (a, b) in zip(table.keys_K.tolist(), spans, strict=True)
            }
            for _ in session.rows
        ]
        self.num_rounds, self.is_running = 0, [True] * len(session.rows)
        for known, row in zip(self.known, session.rows, strict=True):
            add_trigrams(known, row[-16:], 0.04, 3.0)

    def propose(self, budget: int) -> Draft:
        self.num_rounds += 1
        draft = super().propose(budget)
        config: Config = self.config
        for row, known in enumerate(self.known):
            ids = self._session.rows[row]
            expected = {}
            if len(ids) > 1 and self.is_running[row]:
                expected = search(known, *ids[-2:], min(budget, config.depth), config)
                expected = extend_paths(known, *ids[-2:], expected, budget)
                expected = dict(sorted(expected.items(), key=lambda one: -one[1])[: config.num_nodes])
            num_nodes = draft.num_nodes[row] if draft.num_nodes else draft.tree.num_nodes
            parents = draft.tree.parents_RN[row if len(draft.tree.parents_RN) > 1 else 0, :num_nodes].tolist()
            found: list[tuple[int, ...]] = []
            for token, parent in zip(draft.tokens_BN[row, :num_nodes].tolist(), parents, strict=True):
                found.append((*found[parent], token) if found else ())
            assert set(found[1:]) == set(expected)
        return draft if self.num_rounds % 2 else self._session.empty_draft()

    def observe(self, step: Any) -> None:
        super().observe(step)
        self.is_running = [bool(path) for path in step.paths]
        for known, row, path in zip(self.known, self._session.rows, step.paths, strict=True):
            if path:
                add_trigrams(known, row[-16:], 0.04, 3.0)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_add_their_committed_trigrams(temperature: float) -> None:
    target = tiny_target("llama")
    drafter = Compared(filled_drafter(EXAMPLE, target))
    ids, mask = padded(prompts(5), side="left")
    # Some rows end earlier than others.
    eos = own_text(target)[1][-6]
    out = draftsmith.generate(
        target, ids, drafter, attention_mask=mask, max_new_tokens=14, temperature=temperature, seed=1, eos_token_id=eos
    )
    assert drafter.num_rounds > 4 and drafter.num_drafted > 0
    if temperature == 0:
        assert len(set(out.lengths.tolist())) > 2 and out.stats.tau > 1.3
        for found, text in zip(texts(out), own_text(target), strict=True):
            assert found == text[: len(found)]


@pytest.mark.parametrize("maker", ["full", "greedy"])
def test_other_makers_are_lossless(maker: str) -> None:
    """Greedy output equals the target's, and sampled text follows its distribution."""
    target = tiny_target("llama")
    drafter = filled_drafter(Config(maker=maker), target)
    ids, mask = padded(prompts(5), side="left")
    out = draftsmith.generate(target, ids, Watched(drafter), attention_mask=mask, max_new_tokens=20)
    assert texts(out) == own_text(target) and out.stats.tau > 2
    sampling = Drafter(
        Config(maker=maker), distribution_target(), table_of({(4, 2): {7: 0.5, 1: 0.5}, (2, 7): {4: 1.0}}, 8)
    )
    check_distribution(sampling, distribution_target(), num_samples=1_000)


def test_num_nodes_limits_the_tree() -> None:
    target = tiny_target("llama")
    shapes = []
    for num_nodes in (1, 3, 64):
        drafter = Watched(filled_drafter(Config(num_nodes=num_nodes), target))
        draftsmith.generate(target, torch.tensor(prompts(1)), drafter, max_new_tokens=6)
        shapes.append(max(len(tokens) for draft in drafter.drafts for tokens in draft) - 1)
    assert shapes[:2] == [1, 3] and shapes[2] > 3


def test_same_text_gets_the_same_draft() -> None:
    """In any row, and whatever is sampled in the call."""
    target = tiny_target("llama")
    firsts = []
    for rows, seed in (([[3, 4, 5, 3, 4]], 1), ([[6, 7], [3, 4, 5, 3, 4]], 2)):
        ids, mask = padded(rows)
        drafter = Watched(filled_drafter(Config(), target))
        settings = {"temperature": 1.0, "seed": seed, "max_new_tokens": 6}
        draftsmith.generate(target, ids, drafter, attention_mask=mask, **settings)
        firsts.append(drafter.drafts[0][-1])
    assert len(firsts[0]) > 2 and firsts[1][: len(firsts[0])] == firsts[0] and not any(firsts[1][len(firsts[0]) :])


@pytest.mark.parametrize("architecture", SEQ2SEQ)
def test_encoder_decoder_gets_a_single_path(architecture: str) -> None:
    target = tiny_target(architecture)
    expected = greedy_by_transformers(architecture, 5, 20)
    known: Weights = {}
    for text in expected:
        add_trigrams(known, text, 0.25, 1.0)
    drafter = Watched(Drafter(Config(), target, table_of(known, target.vocab_size)))
    ids, mask = padded(prompts(5), side="right")
    out = draftsmith.generate(target, ids, drafter, attention_mask=mask, max_new_tokens=20)
    assert texts(out) == expected and drafter.num_drafted > 0 and out.stats.tau > 1.3


# --- The table ---------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    target = tiny_target("llama")
    draftsmith.save(filled_drafter(Config(), target), tmp_path / "artifact", target=target)
    return tmp_path / "artifact"


def memory_of(array: Any) -> Any:
    return memory_of(array.base) if isinstance(array, np.ndarray) else array


def test_load_maps_the_files_into_memory(saved: Path) -> None:
    target = tiny_target("llama")
    drafter, loaded = filled_drafter(Config(), target), draftsmith.load(saved, target)
    for one, other in zip(drafter.table, loaded.table, strict=True):
        assert np.array_equal(one, other) and one.dtype == other.dtype and len(one) > 30
        assert type(other) is np.ndarray and isinstance(memory_of(other), mmap.mmap) and not other.flags.writeable
    ids, mask = padded(prompts(5))
    drafts = []
    for one in (drafter, loaded):
        watched = Watched(one)
        draftsmith.generate(target, ids, watched, attention_mask=mask, max_new_tokens=12)
        drafts.append(watched.drafts)
    assert drafts[0] == drafts[1]


INVALID: dict[str, list[Any]] = {
    "keys": [
        lambda array: array[::-1],
        lambda array: array - array[0] - 1,
        lambda array: array + VOCAB_SIZE**2,
        lambda array: np.array([array[0], 2**62, -(2**62), *array[3:]]),
    ],
    "begins": [
        lambda array: array[::-1],
        lambda array: array + 1,
        lambda array: array * 2,
        # The differences of these overflow to positive numbers.
        lambda array: np.array([0, 2**62, 2**63 - 1, -(2**62), *array[4:]]),
    ],
    "tokens": [lambda array: array - VOCAB_SIZE, lambda array: array + VOCAB_SIZE],
    "weights": [lambda array: array * 0, lambda array: array + 1, lambda array: array * np.float32("nan")],
}


@pytest.mark.parametrize("name", INVALID)
def test_load_rejects_truncated_and_invalid_files(saved: Path, name: str) -> None:
    file, target = saved / f"{name}.npy", tiny_target("llama")
    array, whole = np.load(file), file.read_bytes()
    for change in (*INVALID[name], lambda array: array[:-1], lambda array: np.append(array, array[-1:])):
        np.save(file, change(array))
        with pytest.raises(ValueError, match=r"\.npy does not fit the other arrays; the artifact must be made again"):
            draftsmith.load(saved, target)
    for odd in (array[None], array.astype("f8"), np.array(["x"])):
        np.save(file, odd)
        with pytest.raises(ValueError, match=rf"{name}\.npy holds \S+\[.*\]; the artifact must be made again"):
            draftsmith.load(saved, target)
    for cut in (whole[:-8], whole[:50], b"", b"no array at all"):
        file.write_bytes(cut)
        with pytest.raises(ValueError, match=f"{name}.npy is missing or truncated"):
            draftsmith.load(saved, target)
    file.unlink()
    with pytest.raises(ValueError, match=f"{name}.npy is missing"):
        draftsmith.load(saved, target)


def test_missing_numba_names_the_extra_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(trigram, "compiled")
    monkeypatch.setitem(sys.modules, "draftsmith.drafters.trigram.compiled", None)
    with pytest.raises(ValueError, match=r"needs numba: pip install 'draftsmith\[compiled\]'"):
        Drafter(Config(), tiny_target("llama"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"maker": "random"}, "maker is 'random'; it must be one of mcts, full, greedy"),
        ({"num_iterations": 0}, "num_iterations is 0; it must be at least 1"),
        ({"depth": 0}, "depth is 0"),
        ({"num_sequences": 0}, "num_sequences is 0"),
        ({"num_nodes": 0}, "num_nodes is 0"),
        ({"bump": -0.1}, "bump is -0.1; it must be at least 0"),
        ({"explore": -1.0}, "explore is -1.0"),
        ({"chance": -1}, "chance is -1"),
        ({"explore_base": 0.0}, "explore_base is 0.0; it must be positive"),
        ({"largest": 0.0}, "largest is 0.0"),
        ({"window": 2}, "window is 2; it must be at least 3"),
    ],
)
def test_config_rejects_invalid_settings(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config(**changes)
