"""Medusa heads on the target's last hidden state (2401.10774, section 2.1), drafting a static tree.

Shape suffixes: B rows, T positions, D hidden width, V vocabulary, K heads.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from draftsmith.core import drafter
from draftsmith.core.drafter import Session, Step
from draftsmith.core.target import Target
from draftsmith.core.tree import Draft
from draftsmith.parts.checks import MAX_DEPTH, check_at_least
from draftsmith.parts.neural.shortlist import SharedHead
from draftsmith.parts.neural.token_heads import (
    ResidualHead,
    StaticTree,
    TokenHeadsState,
    check_tree,
    untied_lm_heads,
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """The shape of the heads and of the draft tree."""

    num_heads: int = 4
    """Number of heads; head k (from 0), at the position of token t, predicts token t + 2 + k."""
    num_blocks: int = 1
    """Number of residual blocks per head."""
    own_head: bool = False
    """Give each head an LM head of its own, initialised from the target's, instead of sharing the target's."""
    shortlist: int = 0
    """If not 0, compute logits for this many tokens only (draftsmith/parts/neural/shortlist.py)."""
    tree: tuple[tuple[int, ...], ...] = ((0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (0, 0, 0, 0))
    """Each node as the ranks along its path: (0, 2) is head 1's third choice after head 0's first."""

    def __post_init__(self) -> None:
        check_at_least(self, 1, "num_heads", "num_blocks", most=MAX_DEPTH)
        check_at_least(self, 0, "shortlist")
        if self.shortlist and self.own_head:
            raise ValueError("a shortlist is of the target's LM head, and own_head gives each head one: drop one")
        check_tree(self.tree, self.num_heads)


class Drafter(nn.Module, drafter.Drafter):
    """K heads: z = h + SiLU(W h + b) per block, then an LM head; h is the last hidden state after the final norm."""

    row_state = ("_state",)
    serving_engines = ("vllm",)

    def __init__(self, config: Config, target: Target) -> None:
        super().__init__()
        self.config = config
        object.__setattr__(self, "target", target)
        self.hidden_layers = (target.num_layers,)
        self._tree = StaticTree(config.tree, target)
        self.blocks = nn.ModuleList(
            ResidualHead(target.hidden_size, config.num_blocks) for _ in range(config.num_heads)
        )
        if config.own_head:
            self.outputs = untied_lm_heads(target, config.num_heads)
        self.shared_head = SharedHead(target, config.shortlist)
        self.to(device=target.device, dtype=target.dtype)

    def heads(self, normed_BTD: Tensor) -> list[Tensor]:
        """Returns each head's features [B, T, D] before the LM head."""
        return [head(normed_BTD) for head in self.blocks]

    def head(self, k: int, z_BTD: Tensor) -> Tensor:
        """Returns head k's logits [B, T, V]."""
        return self.outputs[k](z_BTD) if self.config.own_head else self.shared_head(z_BTD)

    def start(self, session: Session) -> None:
        lm_heads = self.outputs if self.config.own_head else None
        self._state = TokenHeadsState(session, self._tree, self.blocks, lm_heads, self.shared_head)

    def propose(self, budget: int) -> Draft:
        return self._state.propose(budget)

    def observe(self, step: Step) -> None:
        self._state.observe(step)
