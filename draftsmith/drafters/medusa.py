"""Medusa heads on the target's last hidden state (2401.10774, section 2.1), drafting a static tree.

Shape suffixes: B rows, T positions, D hidden width, V vocabulary, K heads.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from draftsmith.core import drafter
from draftsmith.core.drafter import Session, Step
from draftsmith.core.target import Target
from draftsmith.core.tree import Draft
from draftsmith.parts.neural import token_heads


@dataclass(frozen=True, kw_only=True)
class Config:
    """The heads' shape and the tree they fill."""

    num_heads: int = 4
    """Head k (from 0), at the position of token t, predicts token t + 2 + k."""
    num_blocks: int = 1
    """Residual blocks a head, each with weights of its own."""
    own_head: bool = False
    """Whether each head has its own output matrix, started as a copy of the target's, or uses the target's head."""
    tree: tuple[tuple[int, ...], ...] = ((0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (0, 0, 0, 0))
    """Each node as the ranks along its path: (0, 2) is the third guess of head 1 after the first guess of head 0."""

    def __post_init__(self) -> None:
        token_heads.check_tree(self.tree, self.num_heads)


class Drafter(nn.Module, drafter.Drafter):
    """K heads: z = h + SiLU(W h + b) for each block, then the output head; h is the last hidden state, normed."""


    def __init__(self, config: Config, target: Target) -> None:
        super().__init__()
        self.config = config
        object.__setattr__(self, "target", target)
        self.hidden_layers = (target.num_layers,)
        self._tree = token_heads.StaticTree(config.tree, target)
        self.blocks = nn.ModuleList(
            token_heads.ResidualHead(target.hidden_size, config.num_blocks) for _ in range(config.num_heads)
        )
        if config.own_head:
            self.outputs = token_heads.untied_lm_heads(target, config.num_heads)
        self.to(device=target.device, dtype=target.dtype)

    def heads(self, normed_BTD: Tensor) -> list[Tensor]:
        """Returns each head's features [B, T, D] before the output matrix."""
        return [head(normed_BTD) for head in self.blocks]

    def head(self, k: int, z_BTD: Tensor) -> Tensor:
        """Returns head k's logits [B, T, V]."""
        return self.outputs[k](z_BTD) if self.config.own_head else self.target.head(z_BTD)

    def start(self, session: Session) -> None:
        self._state = token_heads.TokenHeadsState(session, self._tree, self.blocks, self.outputs if self.config.own_head else None)

    def propose(self, budget: int) -> Draft:
        return self._state.propose(budget)

    def observe(self, step: Step) -> None:
        self._state.observe(step)
