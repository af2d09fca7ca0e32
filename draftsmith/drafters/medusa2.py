"""Medusa-2: heads trained together with the target, whose changes are low-rank (2401.10774, section 2.2.2).

Heads draft a static tree from the last hidden state of the tuned target; only for that target are they lossless.

Shape suffixes: B rows, T positions, D hidden width, V vocabulary, K heads.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from draftsmith.core import drafter
from draftsmith.core.drafter import Session, Step
from draftsmith.core.target import Target
from draftsmith.core.tree import Draft
from draftsmith.parts.neural import token_heads
from draftsmith.parts.self_drafting.fine_tuned import Adapter, matrices, merged, tuned


@dataclass(frozen=True, kw_only=True)
class Config:
    """The heads' shape, the tree they fill, and what of the target is changed."""

    num_heads: int = 4
    """Head k (from 0), at the position of token t, predicts token t + 2 + k."""
    num_blocks: int = 1
    """Residual blocks a head, each with weights of its own."""
    own_head: bool = False
    """Whether each head has its own output matrix, started as a copy of the target's, or uses the tuned target's."""
    tree: tuple[tuple[int, ...], ...] = ((0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (0, 0, 0, 0))
    """Each node as the ranks along its path: (0, 2) is the third guess of head 1 after the first guess of head 0."""
    rank: int = 32
    """Rank of the change of each matrix."""
    alpha: float = 16.0
    """The change is alpha / rank times the product of its factors."""
    modules: tuple[str, ...] = ()
    """Ends of the names of the linear layers changed, as q_proj; all in the target's blocks, and its head, if empty."""

    def __post_init__(self) -> None:
        token_heads.check_tree(self.tree, self.num_heads)
        if self.rank < 1 or not self.alpha > 0:
            raise ValueError(f"rank {self.rank} must be at least 1 and alpha {self.alpha} positive")


class Drafter(nn.Module, drafter.Drafter):
    """K heads on the last hidden state, normed, of the target with its changes; `target` is that one once loaded."""

    base: Target

    def __init__(self, config: Config, target: Target) -> None:
        super().__init__()
        self.config = config
        object.__setattr__(self, "base", target)
        object.__setattr__(self, "target", target)
        self.hidden_layers = (target.num_layers,)
        self._tree = token_heads.StaticTree(config.tree, target)
        self.blocks = nn.ModuleList(
            token_heads.ResidualHead(target.hidden_size, config.num_blocks) for _ in range(config.num_heads)
        )
        if config.own_head:
            self.outputs = token_heads.untied_lm_heads(target, config.num_heads)
        self.adapters = nn.ModuleList(
            Adapter(layer, config.rank) for layer in matrices(target, config.modules).values()
        )
        self.to(device=target.device, dtype=target.dtype)

    @property
    def fine_tunes_target(self) -> bool:
        return True

    def on_weights_loaded(self) -> None:
        """Makes `target` the one that the weights as they are now were trained with."""
        object.__setattr__(self, "target", tuned(self.base, self.merged()))

    def merged(self) -> dict[str, Tensor]:
        """Returns the changed matrices by the target's names for them."""
        config = self.config
        return merged(self.base, config.modules, self.adapters, scale=config.alpha / config.rank)

    def heads(self, normed_BTD: Tensor) -> list[Tensor]:
        """Returns each head's features [B, T, D] before the output matrix."""
        return [head(normed_BTD) for head in self.blocks]

    def head(self, k: int, z_BTD: Tensor) -> Tensor:
        """Returns head k's logits [B, T, V]."""
        return self.outputs[k](z_BTD) if self.config.own_head else self.target.head(z_BTD)

    def start(self, session: Session) -> None:
        self._state = token_heads.TokenHeadsState(
            session, self._tree, self.blocks, self.outputs if self.config.own_head else None
        )

    def propose(self, budget: int) -> Draft:
        return self._state.propose(budget)

    def observe(self, step: Step) -> None:
        self._state.observe(step)
