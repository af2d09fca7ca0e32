"""Finds the shapes of forwards in which a target gives a token the same bits, by running the target itself.

Nothing is assumed about kernels: tokens fed alone are compared, bit for bit, with the same tokens among others, behind
different numbers of committed tokens and beside other rows.

Shape suffixes: B rows, T tokens of a text, N nodes, H key heads, S cache slots, D a width.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from draftsmith.core.cache import KVCache
from draftsmith.core.fixed_shapes.forwards import MOST_LOGITS, Shapes
from draftsmith.core.target import Target
from draftsmith.core.tree import chain
from draftsmith.inputs.invariance.cancelling import equal_row_counts, is_packed
from draftsmith.inputs.invariance.elementwise import equal_row_multiple

QUERY_MULTIPLES = (1, 4, 8, 16, 32)
NODE_MULTIPLES = (1, 2, 4, 8, 16, 32)
SLOT_MULTIPLE, LAST_SLOTS = 512, (32, *range(64, 512, 64))
"""The multiple of key slots, and the fewer ones to try in place of the last; torch's CPU kernel adds over blocks of
512."""
SIZES_OF_LAST = (1, 2, 3, 5, 8, 16, 33)
STARTS = (300, 250, 122, 505, 1020, 380, 633, 5)
"""Committed tokens before the compared ones, so that these cross multiples of 128 slots, and the numbers at which
attention's kernels change (256, 512, 1,024). Those at which most shapes failed come first."""
LARGE = (128, 512)
"""Nodes of large forwards: prompts are fed in parts of the largest that passes."""
LARGE_STARTS = (0, 512)
USEFUL = 8
"""With fewer nodes than this in a forward there is no room for drafts."""
STAGGER = 3
"""Tokens by which the rows of a batch differ in length."""
BATCH_SIZES = (2, 3, 5, 8)
"""Batch sizes to try besides the largest: rows that end leave smaller batches."""


def shapes_for(target: Target, batch_size: int) -> Shapes:
    """Returns the shapes for batch-invariant decoding of up to `batch_size` rows.

    They are found once per target and number of threads. Raises ValueError if no shapes give the same bits.
    """
    if target.is_run_whole:
        raise ValueError(
            f"batch_invariant: {target.name} can only be run as a whole, so no self-test can be made; leave it out"
        )
    if target.is_recurrent:
        raise ValueError(
            f"batch_invariant: {target.name} has recurrent layers, of which no self-test is made; leave it out"
        )
    found, threads = target.batch_invariant_shapes, torch.get_num_threads()
    if (1, threads) not in found:
        found[1, threads] = find_shapes(target)
    if (batch_size, threads) not in found:
        shapes, num_blocks = found[1, threads], _num_blocks_of_all_kinds(target)
        smaller = [size for size in BATCH_SIZES if size < batch_size]
        if not (
            all(is_equal_in_batch(target, shapes, size, num_blocks) for size in smaller)
            and is_equal_in_batch(target, shapes, batch_size, target.num_layers)
            and has_equal_logits(target, shapes, batch_size)
        ):
            raise ValueError(_refusal(target, batch_size))
        found[batch_size, threads] = shapes
    return found[batch_size, threads]


@torch.inference_mode()
def find_shapes(target: Target) -> Shapes:
    """Returns the smallest shapes in which a row's tokens get the same bits alone, in drafts and in prompts.

    Each matrix and activation function of the model is tried alone, attention on the target's first blocks, and the
    whole target in the end; first with packed weights, then with the model's own. Raises ValueError if there are none.
    """
    modules = target.decoding_modules()
    for packs_weights in (True, False) if any(map(is_packed, modules.modules())) else (False,):
        if (counts := equal_row_counts(modules, packs_weights=packs_weights)) is not None:
            least = Shapes(fewest_nodes=counts[0], most_nodes=counts[1], packs_weights=packs_weights)
            if (shapes := _shapes_from(target, least)) is not None:
                return shapes
    raise ValueError(_refusal(target, 1))


def _shapes_from(target: Target, least: Shapes) -> Shapes | None:
    """Returns the smallest shapes that pass the test, of those that have these numbers of nodes; None without any."""
    num_blocks, only_alone = _num_blocks_of_all_kinds(target), None
    trial = Trial(target, 1, num_blocks=num_blocks)
    if (multiple := equal_row_multiple(target.model, lambda: trial.run(Shapes(), 0, 1), least.most_nodes)) is None:
        return None
    rows = replace(least, node_multiple=multiple, slot_multiple=SLOT_MULTIPLE)
    for shapes in _candidates(trial, rows, target.pads_queries):
        if is_equal_in_batch(target, shapes, 1, target.num_layers) and has_equal_logits(target, shapes, 1):
            if is_equal_in_batch(target, shapes, BATCH_SIZES[1], num_blocks):
                return _with_fewer_slots(trial, shapes)
            only_alone = only_alone or shapes
    return _with_fewer_slots(trial, only_alone) if only_alone is not None else None


def _candidates(trial: "Trial", rows: Shapes, pads_queries: bool) -> Iterator[Shapes]:
    """Yields shapes that pass the trial: first those that leave most room, then others.

    Padded queries come first: they cost less than whole nodes.
    """
    queries = [replace(rows, query_multiple=multiple) for multiple in QUERY_MULTIPLES] if pads_queries else [rows]
    multiples = [multiple for multiple in NODE_MULTIPLES if multiple > rows.node_multiple]
    nodes = [replace(queries[-1], node_multiple=multiple) for multiple in multiples]
    narrow = []
    for shapes in [*queries, *nodes]:
        most = trial.most_equal(shapes)
        if most == shapes.most_nodes:
            yield shapes
        elif most >= max(USEFUL, shapes.node_multiple, shapes.fewest_nodes):
            narrow.append(replace(shapes, most_nodes=most))
    yield from sorted(narrow, key=lambda shapes: -shapes.most_nodes)


def _with_fewer_slots(trial: "Trial", shapes: Shapes) -> Shapes:
    return replace(
        shapes, slots_of_last=tuple(slots for slots in LAST_SLOTS if trial.is_equal_with_last(shapes, slots))
    )


@torch.inference_mode()
def is_equal_in_batch(target: Target, shapes: Shapes, batch_size: int, num_blocks: int) -> bool:
    """Returns whether the first blocks give tokens the bits in drafts of this many rows that they get alone."""
    trial = Trial(target, batch_size, num_blocks=num_blocks)
    most = shapes.most_of_a_row(batch_size)
    sizes = {1, 2, 5, 3 * shapes.node_multiple, 32} if batch_size > 1 else {2, 3 * shapes.node_multiple, 32}
    return all(trial.is_equal(shapes, 250, size) for size in sorted(sizes) if size <= most)


@torch.inference_mode()
def has_equal_logits(target: Target, shapes: Shapes, batch_size: int) -> bool:
    """Returns whether norm and LM head give hidden states the same logits in all rows that they give one alone."""
    trial, is_equal = Trial(target, batch_size, num_blocks=target.num_layers), True
    hidden_BND = trial.run(shapes, 0, min(MOST_LOGITS, shapes.most_of_a_row(batch_size), target.context_length))
    num_nodes = hidden_BND.shape[1]
    for size in sorted({1, 2, 32, num_nodes} & set(range(num_nodes + 1))):
        logits_BNV = target.logits(hidden_BND[:, :size], shapes)
        for row, index in ((0, 0), (batch_size - 1, size - 1)):
            alone_11V = target.logits(hidden_BND[row : row + 1, index : index + 1], shapes)
            is_equal &= alone_11V[0, 0].equal(logits_BNV[row, index])
    return is_equal


class Trial:
    """Random tokens, on which the first blocks of a target can be run in any shapes behind any number of tokens."""

    def __init__(self, target: Target, batch_size: int, *, num_blocks: int) -> None:
        self._target = target
        self._num_blocks = target.num_layers if target.is_encoder_decoder else num_blocks  # which is run whole
        self._length = min(target.context_length, max(STARTS) + 100)
        self._generator = torch.Generator().manual_seed(0)
        source = first_source = None
        if target.is_encoder_decoder:
            source_1T = torch.randint(target.vocab_size, (1, 16), generator=self._generator).to(target.device)
            first_source = target.encode(source_1T, torch.ones_like(source_1T))
            source = first_source.change_rows([0] * batch_size, None)
        tokens_BT = torch.randint(target.vocab_size, (batch_size, self._length), generator=self._generator)
        self._tokens_BT = tokens_BT.to(target.device)
        self._cache = target.new_cache(batch_size, source=source)
        self._cache_of_one = target.new_cache(1, source=first_source)
        self._num_real = min(32, self._length)
        self._run(self._cache_of_one, self._tokens_BT[:1, : self._num_real])
        self.run(Shapes(), 0, self._num_real)
        self._real = [[part.clone() for part in self._cache.stored(layer)] for layer in range(self._num_blocks)]
        for cache in (self._cache, self._cache_of_one):
            cache.lengths = [self._length] * len(cache.lengths)
            cache.prepare(2 * SLOT_MULTIPLE, target.device)  # makes room

    def run(self, shapes: Shapes, start: int, num_nodes: int) -> Tensor:
        """Returns the blocks' output [B, N, D] at the tokens from `start` on, or earlier ones in rows after the first.

        The cache holds the keys and values of the tokens before.
        """
        self._cache.shapes = shapes
        self._cache.lengths = [max(0, start - STAGGER * (row % 8)) for row in range(len(self._tokens_BT))]
        tokens = [row_T[at : at + num_nodes] for row_T, at in zip(self._tokens_BT, self._cache.lengths, strict=True)]
        return self._run(self._cache, torch.stack(tokens))

    def most_equal(self, shapes: Shapes) -> int:
        """Returns the most nodes of a forward, of those tried, up to which every token gets the bits it has alone."""
        passed = 0
        for size in _sizes(shapes):
            starts: tuple[int, ...] = STARTS if size < LARGE[0] else LARGE_STARTS
            if self._length < min(starts[:2]):
                starts = starts[:3]  # the context is too short for more than one: some random values behind it
            if size <= self._length and not all(self.is_equal(shapes, start, size) for start in starts):
                break
            passed = size
        return passed

    def is_equal_with_last(self, shapes: Shapes, num_slots: int) -> bool:
        """Returns whether this many slots in place of the last `slot_multiple` leave every token's bits the same."""
        fewer = replace(shapes, slots_of_last=(num_slots,))
        for end in (num_slots, num_slots + shapes.slot_multiple):
            for size in SIZES_OF_LAST:
                for start in (end - shapes.num_dummies(size) - size, end - 17 - size):
                    if start < 0 or start + size > self._length:
                        continue
                    self._fill(start)
                    if not self.run(fewer, start, size).equal(self.run(shapes, start, size)):
                        return False
        return True

    def is_equal(self, shapes: Shapes, start: int, size: int) -> bool:
        """Returns whether tokens of the first and last row get the bits among `size` nodes that they get alone."""
        start = max(0, min(start, self._length - size))
        self._fill(start)
        together_BND = self.run(shapes, start, size)
        return all(
            self._alone(shapes, row, index).equal(together_BND[row, index])
            for row in sorted({0, len(together_BND) - 1})
            # From the last on: a token fed alone overwrites the keys after its own.
            for index in sorted({0, 1, size // 2, size - 1} & set(range(size)), reverse=True)
        )

    def _alone(self, shapes: Shapes, row: int, index: int) -> Tensor:
        """Returns the blocks' output [D] at a token of the last forward, fed alone in a batch of one."""
        cache, position = self._cache_of_one, self._cache.lengths[row] + index
        for layer in range(self._num_blocks):
            for own, others in zip(cache.stored(layer), self._cache.stored(layer), strict=True):
                own[0, :, :position] = others[row, :, :position]
        cache.shapes, cache.lengths = shapes, [position]
        return self._run(cache, self._tokens_BT[row : row + 1, position : position + 1])[0, 0]

    def _run(self, cache: KVCache, tokens_BN: Tensor) -> Tensor:
        span = None if self._target.is_encoder_decoder else (0, self._num_blocks)
        tree = chain(tokens_BN.shape[1], tokens_BN.device)
        return self._target.forward(tokens_BN, tree, cache, span=span).hidden_BND

    def _fill(self, num_slots: int) -> None:
        """Sets keys and large values of the first slots such that attention over them is nothing but rounding error.

        Each key is there twice, with a value and its negative: another order of addition then changes nearly every bit,
        where it changes one output in thousands otherwise.
        """
        num_pairs = num_slots // 2
        if not num_pairs:
            return
        device = self._tokens_BT.device
        order_S = torch.randperm(2 * num_pairs, generator=self._generator).to(device)
        picked = torch.randint(self._num_real, (num_pairs,), generator=self._generator).to(device)
        for layer, (real_keys, real_values) in enumerate(self._real):
            keys, values = self._cache.stored(layer)
            key_BHSD = real_keys[:, :, picked]
            shape, largest = (*real_values.shape[:2], num_pairs, real_values.shape[3]), torch.finfo(values.dtype).max
            value_BHSD = torch.randn(shape, generator=self._generator).mul_(min(1e8, largest / 8)).to(values)
            keys[:, :, order_S] = torch.cat([key_BHSD, key_BHSD], dim=2)
            values[:, :, order_S] = torch.cat([value_BHSD, -value_BHSD], dim=2)


def _sizes(shapes: Shapes) -> Iterator[int]:
    """Returns the numbers of nodes to try, ascending."""
    multiple = shapes.node_multiple
    few = {multiple * count for count in range(1, 17) if multiple * count <= 64}
    sizes = {*few, 2, 32, 32 + multiple, 64, 64 + multiple, *LARGE}
    return iter(sorted(size for size in sizes if size >= min(multiple, 2) and size <= shapes.most_nodes))


def _num_blocks_of_all_kinds(target: Target) -> int:
    """Returns the number of first blocks among which is one of every kind of layer."""
    kinds = getattr(target.model.config.get_text_config(decoder=True), "layer_types", None) or ["full_attention"]
    return max(kinds.index(kind) for kind in set(kinds)) + 1


def _refusal(target: Target, batch_size: int) -> str:
    dtype = str(target.dtype).removeprefix("torch.")
    return (
        f"batch_invariant: at batch size {batch_size} {target.name} in {dtype} on {target.device.type} gives tokens"
        " other bits in drafts than alone, in all shapes tried; leave batch_invariant out, or load it in another dtype"
    )
