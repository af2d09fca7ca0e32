"""The cache: committed tokens equal a fresh prefill for any accepted paths, and growing loses nothing."""

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from draftsmith.core import cache as cache_module
from draftsmith.core.cache import KVCache
from draftsmith.core.rows import groups_by_length
from draftsmith.core.tree import Tree, chain
from draftsmith.loading.placement.zeros import lazy_zeros
from tests.support.models import CAUSAL, SEQ2SEQ, VOCAB_SIZE, padded, prompts, tiny_target

TREE = Tree.from_parents([[-1, 0, 0, 1, 2, 2, 4, 6]])
PATHS = [[0], [0, 1, 3], [0, 2, 4, 6, 7], [], [0, 2, 5]]


def random_tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCAB_SIZE, shape, generator=torch.Generator().manual_seed(seed))


def committed(cache: KVCache, row: int) -> Tensor:
    """Returns a row's committed keys and values [2 layers, heads, its length, width]."""
    return cache._stores[0][:, row, :, : cache.lengths[row]]


@torch.no_grad()
@pytest.mark.parametrize("architecture", CAUSAL)
def test_committed_paths_equal_a_fresh_prefill(architecture: str) -> None:
    """Three rounds on five ragged rows: paths that must be gathered, paths of one node, a finished row."""
    target, texts = tiny_target(architecture), prompts(5)
    cache = target.new_cache(5)
    target.prefill(texts, cache)
    for turn in range(3):
        tokens_BN = random_tokens(5, TREE.num_nodes, seed=turn)
        target.forward(tokens_BN, TREE, cache)
        paths = PATHS[turn:] + PATHS[:turn]
        cache.commit(paths)
        for row, path in enumerate(paths):
            texts[row] += tokens_BN[row, path].tolist()
        assert cache.lengths == [len(text) for text in texts]
        fresh = target.new_cache(5)
        target.prefill(texts, fresh)
        for row in range(5):
            assert torch.allclose(committed(cache, row), committed(fresh, row), atol=2e-5), (turn, row)


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_commit_gathers_a_single_row(architecture: str) -> None:
    target, (text, *_) = tiny_target(architecture), prompts(1)
    cache, fresh = target.new_cache(1), target.new_cache(1)
    target.prefill([text], cache)
    tokens_BN = random_tokens(1, TREE.num_nodes)
    target.forward(tokens_BN, TREE, cache)
    cache.commit([[0, 2, 4, 6]])
    target.prefill([text + tokens_BN[0, [0, 2, 4, 6]].tolist()], fresh)
    assert torch.allclose(committed(cache, 0), committed(fresh, 0), atol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("architecture", SEQ2SEQ)
def test_committed_chains_of_an_encoder_decoder_equal_a_fresh_prefill(architecture: str) -> None:
    target, texts = tiny_target(architecture), [[0], [0, 7, 9], [0, 3]]
    source = target.encode(*padded(prompts(3)))
    cache, fresh = target.new_cache(3, source=source), target.new_cache(3, source=source)
    target.prefill(texts, cache)
    tokens_BN = random_tokens(3, 4)
    target.forward(tokens_BN, chain(4), cache)
    cache.commit([[0, 1, 2], [0], [0, 1, 2, 3]])
    for row, kept in enumerate((3, 1, 4)):
        texts[row] += tokens_BN[row, :kept].tolist()
    target.prefill(texts, fresh)
    for row in range(3):
        assert torch.allclose(committed(cache, row), committed(fresh, row), atol=2e-5), row


@torch.no_grad()
@pytest.mark.parametrize("chunk", [1, 4, 5])
def test_prefill_in_chunks_equals_prefill_at_once(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    target, texts = tiny_target("mistral"), prompts(5)
    layers = (0, 3)
    whole, parts = target.new_cache(5), target.new_cache(5)
    expected = target.prefill(texts, whole, layers=layers)
    monkeypatch.setattr("draftsmith.core.target.PREFILL_CHUNK", chunk)
    found = target.prefill(texts, parts, layers=layers)
    assert parts.lengths == whole.lengths == [len(text) for text in texts]
    for row, text in enumerate(texts):
        assert torch.allclose(committed(parts, row), committed(whole, row), atol=2e-5)
        for layer in layers:
            assert torch.allclose(found[layer][row, : len(text)], expected[layer][row, : len(text)], atol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["mistral", "gpt2"])
def test_prefill_in_groups_equals_prefill_at_once(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    target, texts = tiny_target(architecture), [*prompts(5), []]
    layers = (0, 3)
    whole, parts = target.new_cache(6), target.new_cache(6)
    monkeypatch.setattr("draftsmith.core.target.PADDING_ON_CPU", 1000)
    expected = target.prefill(texts, whole, layers=layers)
    monkeypatch.setattr("draftsmith.core.target.PADDING_ON_CPU", 2)
    found = target.prefill(texts, parts, layers=layers)
    assert parts.lengths == whole.lengths == [len(text) for text in texts]
    for row, text in enumerate(texts):
        assert torch.allclose(committed(parts, row), committed(whole, row), atol=2e-5)
        for layer in layers:
            assert torch.allclose(found[layer][row, : len(text)], expected[layer][row, : len(text)], atol=2e-5)


def test_groups_have_little_padding() -> None:
    assert groups_by_length([5, 300, 9, 290, 0], 10) == [[1, 3], [0, 2], [4]]
    assert groups_by_length([5, 300, 9], 10_000) == [[0, 1, 2]]
    assert groups_by_length([7], 0) == [[0]]


def fill(cache: KVCache, num_new: int, value: float) -> Tensor:
    """Writes `num_new` new slots per row, each with its own number; returns the numbers [B, N]."""
    batch_size = len(cache.lengths)
    numbers_BN = value + torch.arange(batch_size * num_new).view(batch_size, num_new).float()
    cache.prepare(num_new, numbers_BN.device)
    for layer in range(cache.num_layers):
        states = numbers_BN[:, None, :, None].expand(-1, 2, -1, 3)
        keys, values = cache.update(states + 10_000 * layer, -states, layer)
        assert keys.shape == values.shape == (batch_size, 2, max(cache.lengths) + num_new, 3)
    return numbers_BN


def numbers(cache: KVCache, layer: int = 0) -> list[list[float]]:
    """Returns each row's committed numbers in one layer, and checks that heads, values and widths agree."""
    found = []
    for row in range(len(cache.lengths)):
        stored = committed(cache, row)
        keys, values = stored[2 * layer] - 10_000 * layer, stored[2 * layer + 1]
        assert torch.equal(keys, keys[:1, :, :1].expand_as(keys)) and torch.equal(values, -keys)
        found.append(keys[0, :, 0].tolist())
    return found


@pytest.mark.parametrize("batch_size", [1, 3])
def test_cache_grows_without_loss(batch_size: int) -> None:
    cache = KVCache(num_layers=2, batch_size=batch_size)
    expected: list[list[float]] = [[] for _ in range(batch_size)]
    capacities = set()
    for step in range(60):
        new_BN = fill(cache, 11, 1_000.0 * step)
        paths = [[0, 2, 3, 7, 10], [0], [0, 1, 2]][:batch_size]
        cache.commit(paths)
        for row, path in enumerate(paths):
            expected[row] += new_BN[row, path].tolist()
        capacities.add(cache.capacity)
    assert numbers(cache, 0) == expected and numbers(cache, 1) == expected
    assert cache.lengths == [len(row) for row in expected]
    grown = [cache_module.FIRST_CAPACITY]
    while len(grown) < len(capacities):
        grown.append(grown[-1] + grown[-1] // 4)
    assert capacities == set(grown) and len(grown) > 1, "capacity must grow geometrically, by a quarter"


def test_a_prompt_longer_than_twice_the_capacity() -> None:
    cache = KVCache(num_layers=1, batch_size=1)
    first = fill(cache, 10, 0.0)
    cache.commit([list(range(10))])
    length = 5 * cache_module.FIRST_CAPACITY
    second = fill(cache, length, 500.0)
    cache.commit([list(range(length))])
    assert numbers(cache) == [first[0].tolist() + second[0].tolist()]


def test_rows_can_be_cut_back_and_written_again() -> None:
    """A drafter cuts its own rows back to the accepted tokens, each to another length."""
    cache = KVCache(num_layers=1, batch_size=3)
    first = fill(cache, 6, 0.0)
    cache.commit([list(range(6))] * 3)
    cache.lengths = [6, 2, 4]
    assert cache.is_ragged
    second = fill(cache, 2, 100.0)
    cache.commit([[0, 1], [0, 1], [1]])
    kept = [first[0].tolist(), first[1, :2].tolist(), first[2, :4].tolist()]
    new = [second[0].tolist(), second[1].tolist(), second[2, 1:].tolist()]
    assert numbers(cache) == [old + late for old, late in zip(kept, new, strict=True)]


def test_uncommitted_tokens_are_overwritten() -> None:
    cache = KVCache(num_layers=1, batch_size=2)
    fill(cache, 4, 0.0)
    second = fill(cache, 3, 50.0)
    assert cache.lengths == [0, 0] and cache.num_visible == 3
    cache.commit([[0, 2], []])
    assert numbers(cache) == [second[0, [0, 2]].tolist(), []]


def test_keys_and_values_of_unequal_widths_are_kept_and_gathered() -> None:
    """Layers 0 and 2 have keys of width 3 and values of width 2; layer 1 has one head more."""
    cache = KVCache(num_layers=3, batch_size=2)
    shapes = {(layer, kind): (3 if layer == 1 else 2, 3 - kind) for layer in range(3) for kind in range(2)}
    for value, paths in ((0.0, [[0, 1], [0]]), (100.0, [[0, 2], [0, 1, 2]])):
        cache.prepare(3, torch.device("cpu"))
        for layer in range(3):
            numbers_BN = value + torch.arange(6.0).view(2, 3)
            states = [
                (numbers_BN + 10 * layer + kind / 2)[:, None, :, None].expand(-1, shapes[layer, kind][0], -1, width)
                for kind, width in ((0, shapes[layer, 0][1]), (1, shapes[layer, 1][1]))
            ]
            keys, values = cache.update(*states, layer)
            assert (keys.shape[1], keys.shape[3]) == shapes[layer, 0] and values.shape[3] == shapes[layer, 1][1]
        cache.commit(paths)
    cache.prepare(1, torch.device("cpu"))
    expected = [[0.0, 1.0, 100.0, 102.0], [3.0, 103.0, 104.0, 105.0]]
    for layer in range(3):
        states = [torch.zeros(2, shapes[layer, kind][0], 1, shapes[layer, kind][1]) for kind in range(2)]
        for kind, found in enumerate(cache.update(*states, layer)):
            for row, length in enumerate(cache.lengths):
                kept_T = found[row, 0, :length, 0] - 10 * layer - kind / 2
                assert kept_T.tolist() == expected[row], (layer, kind, row)
    assert len(cache._stores) == 4, "one store for each shape"


def test_keys_and_values_of_unequal_dtypes_keep_them() -> None:
    """Under autocast rotated keys are float32 and values bfloat16; joined in one store they would get one dtype."""
    cache = KVCache(num_layers=2, batch_size=2)
    for paths in ([[0, 1], [0]], [[0], [0, 1]]):
        cache.prepare(2, torch.device("cpu"))
        for layer in range(2):
            keys, values = cache.update(torch.ones(2, 1, 2, 3), torch.ones(2, 1, 2, 3, dtype=torch.bfloat16), layer)
            assert (keys.dtype, values.dtype) == (torch.float32, torch.bfloat16)
        cache.commit(paths)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lazy_zeros_take_memory_where_they_are_written(dtype: torch.dtype) -> None:
    def resident_mib() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 2**20

    before = resident_mib()
    zeros = lazy_zeros((4, 1024, 2**16), torch.empty(0, dtype=dtype))
    assert (zeros.shape, zeros.dtype, zeros.is_contiguous()) == ((4, 1024, 2**16), dtype, True)
    zeros[1, :64] = 1.0
    assert resident_mib() - before < 100, "512 MiB or more are reserved, and some 16 written"
    assert zeros[0, 0].sum() == 0 and zeros[1, :65].sum() == 64 * 2**16
    assert lazy_zeros((2, 3), torch.empty(0, dtype=dtype)).tolist() == [[0.0] * 3] * 2


def test_rows_that_come_and_go_keep_what_was_fed_since_the_last_commit() -> None:
    """A drafter may feed nodes before the forward that makes the cache larger."""
    cache = KVCache(num_layers=1, batch_size=2)
    length = cache_module.FIRST_CAPACITY - 4
    text_BN = fill(cache, length, 0.0)
    cache.commit([list(range(length)), list(range(length - 20))])
    nodes_BN = fill(cache, 3, 500.0)
    cache.prepare(60, nodes_BN.device)
    assert cache.capacity > cache_module.FIRST_CAPACITY
    keys, _ = cache.stored(0)
    for row, kept in enumerate((length, length - 20)):
        expected = [*text_BN[row, :kept].tolist(), *nodes_BN[row].tolist()]
        assert keys[row, 0, : kept + 3, 0].tolist() == expected
