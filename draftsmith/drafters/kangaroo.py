"""Kangaroo's adapter on an early exit of the target (2404.18911): one attention layer, then the target's own LM head.

The target's first blocks run over the draft in the target's own cache, and verification resumes after them.

Shape suffixes: B rows, N nodes, M new nodes, P length of the longest accepted path, D hidden width, V vocabulary,
S cache slots, R is B or 1.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from draftsmith.core import drafter
from draftsmith.core.cache import KVCache
from draftsmith.core.drafter import Session, Step
from draftsmith.core.target import Target
from draftsmith.core.tree import Draft, Tree
from draftsmith.length import policies
from draftsmith.parts import autoregressive
from draftsmith.parts.checks import MAX_DEPTH, check_at_least
from draftsmith.parts.neural.layers import Attention, gather_path
from draftsmith.parts.neural.shortlist import SharedHead
from draftsmith.parts.self_drafting.early_exit import DrafterCache, EarlyExitRunner, check_exit_layer


@dataclass(frozen=True, kw_only=True)
class Config:
    """The exit layer, the adapter's shape, and the shape of drafts."""

    exit_layer: int = 2
    """Number of the target's blocks that draft tokens run through."""
    num_heads: int = 4
    """Attention heads of the adapter."""
    shortlist: int = 0
    """If not 0, compute logits for this many tokens only (draftsmith/parts/neural/shortlist.py)."""
    num_draft: int = 6
    """Maximum number of tokens drafted per round."""
    length: str = "confidence=0.6"
    """Draft-length policy of chains, the second exit: a name of draftsmith/length/policies.py, and its number."""
    width: int = 0
    """If not 0, drafts are dynamic trees: the `width` likeliest nodes per level get `width` children each."""
    num_nodes: int = 16
    """Number of nodes kept in a dynamic tree."""

    def __post_init__(self) -> None:
        check_at_least(self, 1, "exit_layer", "num_heads", most=MAX_DEPTH)
        check_at_least(self, 0, "shortlist")
        autoregressive.check_shape(self)
        policies.make(self.length)

    @property
    def supports_early_stop(self) -> bool:
        return not self.width


class Drafter(nn.Module, drafter.Drafter):
    """The adapter: z = norm(h + attention(norm(h))), h the exit layer; the target's LM head maps z to logits.

    The last norm is initialised from the target's final one.
    """

    row_state = ("_cache",)

    def __init__(self, config: Config, target: Target) -> None:
        super().__init__()
        check_exit_layer(config.exit_layer, target, width=config.width)
        self.config = config
        object.__setattr__(self, "target", target)
        self.hidden_layers = (config.exit_layer,)
        self.attention_norm = nn.RMSNorm(target.hidden_size, eps=1e-6)
        self.attention = Attention(target.hidden_size, num_heads=config.num_heads)
        self.norm = target.copy_norm()
        self.head = SharedHead(target, config.shortlist)
        self.to(device=target.device, dtype=target.dtype)

    def forward(
        self, hidden_BND: Tensor, positions_RN: Tensor, *, mask_R1NS: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        """Returns the input of the target's LM head [B, N, D] from the exit layer; causal without a mask."""
        normed_BND = self.attention_norm(hidden_BND)
        return self.norm(hidden_BND + self.attention(normed_BND, positions_RN, mask_R1NS=mask_R1NS, cache=cache))

    def start(self, session: Session) -> None:
        layer, lengths = self.config.exit_layer, [len(row) - 1 for row in session.rows]
        self._session, self._exit = session, EarlyExitRunner(session, layer)
        self._cache = DrafterCache(self._cached_layers, num_layers=1, num_rows=len(lengths))
        if session.hidden:
            self._cache.read(session.hidden[layer], lengths)

    def propose(self, budget: int) -> Draft:
        draft = autoregressive.draft(self._logits, self._session, self.config, budget, self.head.shortlist)
        return self._exit.with_resume_point(draft, is_reordered=bool(self.config.width))

    def observe(self, step: Step) -> None:
        hidden_BPD = gather_path(step.hidden[self.config.exit_layer], step.verdict)
        self._cache.keep(hidden_BPD, step.paths, self._exit.accepted(step))

    def _logits(self, tokens_BN: Tensor, tree: Tree, first: int) -> Tensor:
        """Returns the logits [B, M, W] of the shortlist after the nodes from `first` on."""
        hidden_BMD = self._exit.run(tokens_BN, tree, first)
        return self.head.listed(self._cache.run(hidden_BMD, tree, first))

    def _cached_layers(self, hidden_BMD: Tensor, positions_BM: Tensor, mask_R1MS: Tensor, cache: KVCache) -> Tensor:
        return self(hidden_BMD, positions_BM, mask_R1NS=mask_R1MS, cache=cache)
