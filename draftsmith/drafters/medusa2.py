"""Medusa-2: heads trained together with low-rank changes of the target (2401.10774, section 2.2.2).

The heads draft a static tree from the last hidden state of the fine-tuned target; they are lossless for it alone.

Shape suffixes: B rows, T positions, D hidden width, V vocabulary, K heads.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from draftsmith.core import drafter
from draftsmith.core.drafter import Session, Step
from draftsmith.core.target import Target
from draftsmith.core.tree import Draft
from draftsmith.parts.checks import MAX_DEPTH, MAX_WIDTH, check_at_least, check_positive
from draftsmith.parts.neural.token_heads import (
    ResidualHead,
    StaticTree,
    TokenHeadsState,
    check_tree,
    untied_lm_heads,
)
from draftsmith.parts.self_drafting.fine_tuned import Adapter, fine_tuned_target, linear_layers, merged_weights


@dataclass(frozen=True, kw_only=True)
class Config:
    """The shape of the heads and of the draft tree, and the target's layers that are fine-tuned."""

    num_heads: int = 4
    """Number of heads; head k (from 0), at the position of token t, predicts token t + 2 + k."""
    num_blocks: int = 1
    """Number of residual blocks per head."""
    own_head: bool = False
    """Give each head an LM head of its own, initialised from the target's, instead of sharing the tuned target's."""
    tree: tuple[tuple[int, ...], ...] = ((0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (0, 0, 0, 0))
    """Each node as the ranks along its path: (0, 2) is head 1's third choice after head 0's first."""
    rank: int = 32
    """Rank of each layer's low-rank change."""
    alpha: float = 16.0
    """Scale of the change: alpha / rank times the product of its factors."""
    modules: tuple[str, ...] = ()
    """Last parts of the names of the linear layers to change, such as q_proj; if empty, all in the target's blocks and
    its LM head."""

    def __post_init__(self) -> None:
        check_at_least(self, 1, "num_heads", "num_blocks", most=MAX_DEPTH)
        check_tree(self.tree, self.num_heads)
        check_at_least(self, 1, "rank", most=MAX_WIDTH)
        check_positive(self, "alpha")


class Drafter(nn.Module, drafter.Drafter):
    """K heads on the last hidden state, after the final norm, of the fine-tuned target.

    Once weights are loaded, `target` is the fine-tuned target and `base` the user's.
    """

    row_state = ("_state",)
    base: Target

    def __init__(self, config: Config, target: Target) -> None:
        super().__init__()
        self.config = config
        object.__setattr__(self, "base", target)
        object.__setattr__(self, "target", target)
        self.hidden_layers = (target.num_layers,)
        self._tree = StaticTree(config.tree, target)
        self.blocks = nn.ModuleList(
            ResidualHead(target.hidden_size, config.num_blocks) for _ in range(config.num_heads)
        )
        if config.own_head:
            self.outputs = untied_lm_heads(target, config.num_heads)
        layers = linear_layers(target, config.modules)
        self.adapters = nn.ModuleList(Adapter(layer, config.rank) for layer in layers.values())
        self.to(device=target.device, dtype=target.dtype)

    @property
    def fine_tunes_target(self) -> bool:
        return True

    def on_weights_loaded(self) -> None:
        """Sets `target` to the target fine-tuned by the current weights."""
        object.__setattr__(self, "target", fine_tuned_target(self.base, self.merged_weights()))

    def merged_weights(self) -> dict[str, Tensor]:
        """Returns the fine-tuned weights by the target's names for them."""
        config = self.config
        return merged_weights(self.base, config.modules, self.adapters, scale=config.alpha / config.rank)

    def heads(self, normed_BTD: Tensor) -> list[Tensor]:
        """Returns each head's features [B, T, D] before the LM head."""
        return [head(normed_BTD) for head in self.blocks]

    def head(self, k: int, z_BTD: Tensor) -> Tensor:
        """Returns head k's logits [B, T, V]."""
        return self.outputs[k](z_BTD) if self.config.own_head else self.target.head(z_BTD)

    def start(self, session: Session) -> None:
        lm_heads = self.outputs if self.config.own_head else None
        self._state = TokenHeadsState(session, self._tree, self.blocks, lm_heads)

    def propose(self, budget: int) -> Draft:
        return self._state.propose(budget)

    def observe(self, step: Step) -> None:
        self._state.observe(step)
