"""Finds the shapes of forwards in which a target gives a token the same bits, by running the target itself.

Nothing is assumed about kernels: tokens fed alone are compared, bit for bit, with the same tokens among others, behind
different numbers of committed tokens.

Shape suffixes: B rows, T tokens of a text, N nodes, H key heads, S cache slots, D a width.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from draftsmith.core.fixed_shapes.forwards import MOST_LOGITS, Shapes
from draftsmith.core.target import Target
from draftsmith.core.tree import chain

NODE_MULTIPLES = (1, 2, 4, 8, 16, 32)
SLOT_MULTIPLES = (1, 16, 32, 64, 128, 256, 512)
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


def shapes_for(target: Target, batch_size: int) -> Shapes:
    """Returns the shapes for batch-invariant decoding of `batch_size` rows, found once per target and thread count.

    Raises ValueError if no shapes give the same bits.
    """
    if target.is_run_whole:
        raise ValueError(
            f"batch_invariant: {target.name} can only be run as a whole, so no self-test can be made; leave it out"
        )
    found, threads = target.batch_invariant_shapes, torch.get_num_threads()
    if (1, threads) not in found:
        found[1, threads] = find_shapes(target)
    if (batch_size, threads) not in found:
        shapes = found[1, threads]
        if not is_equal_on_whole(target, shapes, batch_size):
            raise ValueError(_refusal(target, batch_size))
        found[batch_size, threads] = shapes
    return found[batch_size, threads]


@torch.inference_mode()
def find_shapes(target: Target) -> Shapes:
    """Returns the smallest shapes in which a row's tokens get the same bits alone, in drafts and in prompts.

    They are searched on the target's first blocks and confirmed on the whole. Raises ValueError if there are none.
    """
    trial = Trial(target, 1, num_blocks=_num_blocks_of_all_kinds(target))
    for shapes in _candidates(trial):
        for multiple in SLOT_MULTIPLES:
            smaller = replace(shapes, slot_multiple=multiple)
            has_passed = smaller == shapes or trial.most_equal(smaller) == shapes.most_nodes
            if has_passed and is_equal_on_whole(target, smaller, 1):
                return smaller
    raise ValueError(_refusal(target, 1))


def _candidates(trial: "Trial") -> Iterator[Shapes]:
    """Yields shapes of the largest slot multiple that pass the trial: first those that leave most room, then others."""
    narrow = []
    for multiple in NODE_MULTIPLES:
        shapes = Shapes(node_multiple=multiple, most_nodes=LARGE[-1], slot_multiple=SLOT_MULTIPLES[-1])
        most = trial.most_equal(shapes)
        if most == shapes.most_nodes:
            yield shapes
        elif most >= max(USEFUL, multiple):
            narrow.append(replace(shapes, most_nodes=most))
    yield from sorted(narrow, key=lambda shapes: -shapes.most_nodes)


@torch.inference_mode()
def is_equal_on_whole(target: Target, shapes: Shapes, batch_size: int) -> bool:
    """Returns whether the whole target, its LM head included, gives tokens the same bits in these shapes."""
    trial = Trial(target, batch_size, num_blocks=target.num_layers)
    sizes = [size for size in _sizes(shapes) if size in (2, shapes.node_multiple, 3 * shapes.node_multiple, 32)]
    is_equal = all(trial.is_equal(shapes, 250, size) for size in sizes)
    hidden_BND = trial.run(shapes, 0, min(MOST_LOGITS, shapes.most_nodes, target.context_length))
    for size in {*sizes, hidden_BND.shape[1]}:
        logits_BNV = target.logits(hidden_BND[:, :size], shapes)
        for index in (0, size - 1):
            alone_B1V = target.logits(hidden_BND[:, index : index + 1], shapes)
            is_equal &= alone_B1V.equal(logits_BNV[:, index : index + 1])
    return is_equal


class Trial:
    """Random tokens, on which the first blocks of a target can be run in any shapes behind any number of tokens."""

    def __init__(self, target: Target, batch_size: int, *, num_blocks: int) -> None:
        self._target, self._num_blocks = target, num_blocks
        self._length = min(target.context_length, max(STARTS) + 100)
        self._generator = torch.Generator().manual_seed(0)
        source = None
        if target.is_encoder_decoder:
            source_BT = torch.randint(target.vocab_size, (batch_size, 16), generator=self._generator)
            source_BT = source_BT.to(target.device)
            source = target.encode(source_BT, torch.ones_like(source_BT))
        tokens_BT = torch.randint(target.vocab_size, (batch_size, self._length), generator=self._generator)
        self._tokens_BT = tokens_BT.to(target.device)
        self._cache = target.new_cache(batch_size, source=source)
        self._num_real = min(32, self._length)
        self.run(Shapes(), 0, self._num_real)
        self._real = [[part.clone() for part in self._cache.stored(layer)] for layer in range(num_blocks)]
        self._cache.lengths = [self._length] * batch_size
        self._cache.prepare(2 * SLOT_MULTIPLES[-1], target.device)  # makes room

    def run(self, shapes: Shapes, start: int, num_nodes: int) -> Tensor:
        """Returns the blocks' output [B, N, D] at the tokens from `start` on, or earlier ones in rows after the first.

        The cache holds the keys and values of the tokens before.
        """
        self._cache.shapes = shapes
        self._cache.lengths = [max(0, start - STAGGER * (row % 8)) for row in range(len(self._tokens_BT))]
        tokens = [row_T[at : at + num_nodes] for row_T, at in zip(self._tokens_BT, self._cache.lengths, strict=True)]
        span = None if self._target.is_encoder_decoder else (0, self._num_blocks)
        tree = chain(num_nodes, self._tokens_BT.device)
        return self._target.forward(torch.stack(tokens), tree, self._cache, span=span).hidden_BND

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

    def is_equal(self, shapes: Shapes, start: int, size: int) -> bool:
        """Returns whether tokens get the bits in a forward of `size` nodes that they get alone."""
        start = max(0, min(start, self._length - size))
        self._fill(start)
        together_BND = self.run(shapes, start, size)
        # From the last on: a token fed alone overwrites the keys after its own.
        for index in sorted({0, 1, size // 2, size - 1} & set(range(size)), reverse=True):
            if not self.run(shapes, start + index, 1).equal(together_BND[:, index : index + 1]):
                return False
        return True

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
