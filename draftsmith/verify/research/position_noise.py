"""Noise that belongs to a token's position in a row's text, not to the order of calls, for `verifier="coupled"`.

A counter-based generator, Philox4x32-10 (Salmon et al., SC 2011), makes it, so that the noise of any position can be
computed alone; its integer operations give the same bits on every device.

Shape suffixes: X positions, each of one row, W groups of four tokens, V vocabulary; 2 and 4 are words of 32 bits, each
in an int64.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

MULTIPLIERS, KEY_STEPS = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85)
WORD, NUM_ROUNDS = 0xFFFFFFFF, 10

Identity = tuple[int, int]
"""A row's seed, of 64 bits, and its index among the rows with this seed, of 32 bits."""


def philox(counter_4XW: Tensor, key_2XW: Tensor) -> Tensor:
    """Returns the random words [4, X, W] of Philox4x32-10 for counters [4, X, W] and keys [2, X, 1]."""
    multiplier_2XW, key_step_2XW = (
        torch.tensor(pair, device=counter_4XW.device)[:, None, None] for pair in (MULTIPLIERS, KEY_STEPS)
    )
    even_2XW, odd_2XW = counter_4XW[0::2], counter_4XW[1::2].flip(0)
    for _ in range(NUM_ROUNDS):
        # An int64 holds all 64 bits of the product. One mask for each round removes what is above a word: copies of
        # the sign bit that the shift brings in, and the high half of the round before, whose low half is the odd word.
        product_2XW = even_2XW * multiplier_2XW
        even_2XW = (product_2XW >> 32).bitwise_xor_(odd_2XW).flip(0).bitwise_xor_(key_2XW).bitwise_and_(WORD)
        odd_2XW, key_2XW = product_2XW, (key_2XW + key_step_2XW) & WORD
    return torch.stack([even_2XW, odd_2XW.flip(0) & WORD], dim=1).flatten(0, 1)


def exponentials(
    rows: Sequence[Identity], positions: Sequence[int], vocab_size: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Returns independent Exp(1) variables [X, V] in float32: one for each token at each row's position.

    Token i gets word w = i mod 4 of the counter (i // 4, position, index of the row, 0) under the row's seed as key,
    and the variable -ln((w + 1/2) / 2^32), which lies between 1e-10 and 23.
    """
    num_groups = -(-vocab_size // 4)
    counter_4XW = torch.zeros(4, len(rows), num_groups, dtype=torch.long, device=device)
    counter_4XW[0] = torch.arange(num_groups, device=device)
    counter_4XW[1] = torch.tensor(positions, device=device)[:, None]
    counter_4XW[2] = torch.tensor([index for _, index in rows], device=device)[:, None]
    keys = [[seed & WORD for seed, _ in rows], [seed >> 32 & WORD for seed, _ in rows]]
    words_4XW = philox(counter_4XW, torch.tensor(keys, device=device)[..., None])
    return of_words(words_4XW).permute(1, 2, 0).to(torch.float32).flatten(1)[:, :vocab_size]


def of_words(words: Tensor) -> Tensor:
    """Returns the Exp(1) variables of random words; in float64, as large words would round to a uniform of 1 in 32."""
    return words.double().add_(0.5).mul_(2.0**-32).log_().neg_()


@dataclass(frozen=True, eq=False)
class PositionNoise:
    """The noise of each row's next tokens, kept from drafting to verification."""

    identities: list[Identity]
    """Each row's identity; whoever puts another text in a row's place replaces it."""
    rows: list[list[int]]
    """Each row's token ids so far, which their owner extends in place; a token's position is its index in its row."""
    _kept: dict[tuple[int, Identity, int, int], Tensor] = field(default_factory=dict)

    def following(self, rows: list[list[int]]) -> "PositionNoise":
        """Returns the noise of the same rows after other texts, such as those that a draft model has drafted."""
        return PositionNoise(self.identities, rows)

    def scores(self, probs_XFV: Tensor, depths: Sequence[int], rows: Sequence[int]) -> Tensor:
        """Returns probabilities over the variables of the positions that are `depths` after the next token's of `rows`.

        The token of the largest score is a draw from the probabilities, and the k largest are k draws without
        replacement: scores are in the order of log-probabilities plus Gumbel noise, which is -ln of the variables.
        """
        vocab_size, device = probs_XFV.shape[-1], probs_XFV.device
        keys = [
            (row, self.identities[row], len(self.rows[row]) + depth, vocab_size)
            for row, depth in zip(rows, depths, strict=True)
        ]
        if missing := [key for key in keys if key not in self._kept]:
            for key in list(self._kept):
                row, identity, position, _ = key
                is_gone = row >= len(self.identities) or identity != self.identities[row]
                if is_gone or position < len(self.rows[row]):
                    del self._kept[key]
            _, identities, positions, _ = zip(*missing, strict=True)
            self._kept.update(zip(missing, exponentials(identities, positions, vocab_size, device), strict=True))
        return probs_XFV / torch.stack([self._kept[key].to(device) for key in keys])[:, None]
