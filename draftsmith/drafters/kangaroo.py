"""Kangaroo's adapter on an early exit of the target (2404.18911): one attention, then the target's own head.

Drafts pass the target's first blocks in the target's own cache, and verification goes on from there.

Shape suffixes: B rows, N nodes, M new nodes, P length of the longest accepted path, D hidden width, V vocabulary,
S cache slots, R is B or 1.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from draftsmith.core.cache import KVCache
from draftsmith.core import drafter
from draftsmith.core.drafter import Session, Step
from draftsmith.core.target import Target
from draftsmith.core.tree import Draft, Tree
from draftsmith.length import policies
from draftsmith.parts import growth
from draftsmith.parts.neural.layers import Attention, gather_path
from draftsmith.parts.self_drafting.early_exit import Shallow, Trail


@dataclass(frozen=True, kw_only=True)
class Config:
    """Where drafts leave the target, the adapter's shape, and how long they are."""

    exit_layer: int = 2
    """Blocks of the target that every drafted token passes."""
    num_heads: int = 4
    """Of the adapter's attention."""
    num_draft: int = 6
    """Most tokens drafted at a time."""
    length: str = "confidence=0.6"
    """How long chains are, the second exit: a policy of draftsmith/length/policies.py, and its number."""
    width: int = 0
    """If not 0, trees grow where the adapter is confident: so many nodes a level are given so many children."""
    num_nodes: int = 16
    """Nodes kept of such a tree."""

    def __post_init__(self) -> None:
        for name in ("exit_layer", "num_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        growth.check_shape(self)
        policies.make(self.length)

    @property
    def supports_early_stop(self) -> bool:
        return not self.width


class Drafter(nn.Module, drafter.Drafter):
    """The adapter: z = norm(h + attention(norm(h))), h the exit layer; the target's head makes logits of z.

    The last norm starts as a copy of the target's final one.
    """


    def __init__(self, config: Config, target: Target) -> None:
        super().__init__()
        if target.is_encoder_decoder:
            raise ValueError(f"{target.name} is an encoder-decoder, whose blocks cannot be run in two parts")
        if config.exit_layer > target.num_layers:
            raise ValueError(f"exit_layer is {config.exit_layer}; {target.name} has {target.num_layers} blocks")
        self.config = config
        object.__setattr__(self, "target", target)
        self.hidden_layers = (config.exit_layer,)
        self.attention_norm = nn.RMSNorm(target.hidden_size, eps=1e-6)
        self.attention = Attention(target.hidden_size, num_heads=config.num_heads)
        self.norm = target.copy_norm()
        self.to(device=target.device, dtype=target.dtype)

    def forward(
        self, hidden_BND: Tensor, positions_RN: Tensor, *, mask_R1NS: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        """Returns what the target's head takes [B, N, D], from the exit layer; causal without a mask."""
        normed_BND = self.attention_norm(hidden_BND)
        return self.norm(hidden_BND + self.attention(normed_BND, positions_RN, mask_R1NS=mask_R1NS, cache=cache))

    def start(self, session: Session) -> None:
        layer, lengths = self.config.exit_layer, [len(row) - 1 for row in session.rows]
        self._session, self._shallow = session, Shallow(session, layer)
        self._trail = Trail(self._adapted, num_layers=1, num_rows=len(lengths))
        self._draft: Draft | None = None
        self._num_in_place = 0
        if session.hidden:
            self._trail.read(session.hidden[layer], lengths)

    def propose(self, budget: int) -> Draft:
        draft = growth.draft(self._logits, self._session, self.config, budget)
        # The last token of a chain has not been run yet; the nodes of a tree have been put in another order.
        self._num_in_place = 1 if self.config.width else draft.tree.num_nodes - 1
        self._draft = self._shallow.entered(draft, self._num_in_place)
        return self._draft

    def observe(self, step: Step) -> None:
        hidden_BPD = gather_path(step.hidden[self.config.exit_layer], step.verdict)
        # Of another drafter's draft only node 0 is the same.
        in_place = self._num_in_place if step.is_of(self._draft) else min(self._num_in_place, 1)
        self._trail.keep(hidden_BPD, step.paths, in_place)
        self._num_in_place = 0

    def _logits(self, tokens_BN: Tensor, tree: Tree, first: int) -> Tensor:
        """Returns the logits [B, M, V] after the nodes from `first` on."""
        hidden_BMD = self._shallow.run(tokens_BN, tree, first)
        return self.target.head(self._trail.run(hidden_BMD, tree, first))

    def _adapted(self, hidden_BMD: Tensor, positions_BM: Tensor, mask_R1MS: Tensor, cache: KVCache) -> Tensor:
        return self(hidden_BMD, positions_BM, mask_R1NS=mask_R1MS, cache=cache)
