"""Early exit: the target's first blocks draft, through its own norm and head or trained ones (LayerSkip, 2404.16710).

Drafts pass those blocks in the target's own cache, and verification goes on from there. Extra blocks and recycling of
the target's last hidden state follow lucidrains/speculative-decoding.

Shape suffixes: B rows, T positions, N nodes, M new nodes, P length of the longest accepted path, D hidden width,
V vocabulary, S cache slots.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from draftsmith.core import drafter
from draftsmith.core.cache import KVCache
from draftsmith.core.drafter import Session, Step
from draftsmith.core.target import Target
from draftsmith.core.tree import Draft, Tree
from draftsmith.length import policies
from draftsmith.parts import growth
from draftsmith.parts.neural.layers import Block, gather_path
from draftsmith.parts.neural.token_heads import last_accepted_hidden, untied_lm_heads
from draftsmith.parts.self_drafting.early_exit import Shallow, Trail
from draftsmith.parts.self_drafting.fine_tuned import Adapter, Tuned, matrices, merged, tuned, twin
from draftsmith.verify.paths import values_at


@dataclass(frozen=True, kw_only=True)
class Config:
    """Where drafts leave the target, what lies between there and their logits, and how long they are."""

    exit_layer: int = 2
    """Blocks of the target that every drafted token passes."""
    num_blocks: int = 0
    """Extra transformer blocks after them."""
    num_heads: int = 4
    """Attention heads of an extra block."""
    inner_width: int = 0
    """Width of its feed-forward layer, 0 for 8/3 of the target's width."""
    own_norm: bool = True
    """Whether a norm of its own, started as the target's, comes before the head, or the target's."""
    own_head: bool = False
    """Whether it has an output matrix of its own, started as the target's, or uses the target's head."""
    recycling: bool = False
    """Whether the last hidden state of the last verified token, through a matrix, is added to those of the exit."""
    tunes: bool = False
    """Whether it comes with a changed target, trained to be left early, and drafts for that in place of the user's."""
    rank: int = 0
    """Rank of the change of each of that target's matrices; 0 if all its weights are its own."""
    alpha: float = 16.0
    """Such a change is alpha / rank times the product of its factors."""
    modules: tuple[str, ...] = ()
    """Ends of the names of the linear layers changed so, as q_proj; if empty all in its blocks, and its head."""
    num_draft: int = 6
    """Most tokens drafted at a time."""
    length: str = "confidence=0.6"
    """How long chains are: a policy of draftsmith/length/policies.py, and its number."""
    width: int = 0
    """If not 0, trees grow where the exit is confident: so many nodes a level are given so many children."""
    num_nodes: int = 16
    """Nodes kept of such a tree."""

    def __post_init__(self) -> None:
        for name in ("exit_layer", "num_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("num_blocks", "inner_width", "rank"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must not be negative")
        if not self.alpha > 0:
            raise ValueError(f"alpha is {self.alpha}; it must be positive")
        if not self.tunes and (self.rank or self.modules):
            raise ValueError("rank and modules say how a target is changed, and it stays as it is without tunes")
        growth.check_shape(self)
        policies.make(self.length)

    @property
    def supports_early_stop(self) -> bool:
        return not self.width


class Drafter(nn.Module, drafter.Drafter):
    """Logits head(norm(blocks(h + R r))): h leaves the target's first blocks, r is the last verified hidden state."""

    serving_engines = ("vllm", "sglang")
    base: Target
    _changed: Any

    def __init__(self, config: Config, target: Target) -> None:
        super().__init__()
        if target.is_encoder_decoder:
            raise ValueError(f"{target.name} is an encoder-decoder, whose blocks cannot be run in two parts")
        if config.exit_layer > target.num_layers:
            raise ValueError(f"exit_layer is {config.exit_layer}; {target.name} has {target.num_layers} blocks")
        self.config = config
        object.__setattr__(self, "base", target)
        object.__setattr__(self, "target", target)
        width, last = target.hidden_size, target.num_layers
        kept = {last} if config.recycling else set()
        self.hidden_layers = tuple(sorted(kept | ({config.exit_layer} if config.num_blocks else set())))
        inner_width = config.inner_width or -(-8 * width // 96) * 32
        self.blocks = nn.ModuleList(
            Block(width, num_heads=config.num_heads, inner_width=inner_width) for _ in range(config.num_blocks)
        )
        if config.recycling:
            self.recycle = nn.Linear(width, width, bias=False)
            nn.init.zeros_(self.recycle.weight)
        if config.own_norm:
            self.norm = target.copy_norm()
        if config.own_head:
            (self.output,) = untied_lm_heads(target, 1)
        if config.tunes and config.rank:
            self.adapters = nn.ModuleList(
                Adapter(layer, config.rank) for layer in matrices(target, config.modules).values()
            )
        elif config.tunes:
            # Of the copy only the parameters are the drafter's: a change of dtype must not touch its buffers.
            object.__setattr__(self, "_changed", twin(target.model, own=dict(target.model.named_parameters())))
            self.weights = nn.ParameterList(self._changed.parameters())
        self.to(device=target.device, dtype=target.dtype)

    @property
    def fine_tunes_target(self) -> bool:
        return self.config.tunes

    def on_weights_loaded(self) -> None:
        """Makes `target` the changed one, if it comes with one."""
        config = self.config
        if config.tunes and config.rank:
            changes = merged(self.base, config.modules, self.adapters, scale=config.alpha / config.rank)
            object.__setattr__(self, "target", tuned(self.base, changes))
        elif config.tunes:
            object.__setattr__(self, "target", Tuned(self._changed, self.base))

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Returns what the head takes [B, T, D], of whole texts."""
        positions_1T = torch.arange(x_BTD.shape[1], device=x_BTD.device)[None]
        for block in self.blocks:
            x_BTD = block(x_BTD, positions_1T)
        return self._normed(x_BTD)

    def entrance(self, hidden_BTD: Tensor, recycled_BTD: Tensor | None) -> Tensor:
        """Returns h + R norm(r) [B, T, D]; what is recycled is the target's last hidden state, None without it."""
        if recycled_BTD is None:
            return hidden_BTD
        return hidden_BTD + self.recycle(self.target.norm(recycled_BTD))

    def head(self, normed_BTD: Tensor) -> Tensor:
        """Returns logits [B, T, V]."""
        return self.output(normed_BTD) if self.config.own_head else self.target.head(normed_BTD)

    def start(self, session: Session) -> None:
        config, lengths = self.config, [len(row) for row in session.rows]
        self._session, self._shallow = session, Shallow(session, config.exit_layer)
        self._trail = Trail(self._extra, config.num_blocks, len(lengths))
        self._draft: Draft | None = None
        self._num_in_place = 0
        before_BTD, self._recycled_B1D = None, None
        if config.recycling:
            # In a prompt every token is as if drafted right after the one before it had been verified.
            no_hidden_BTD = self.recycle.weight.new_zeros(len(lengths), 0, self.target.hidden_size)
            before_BTD = nn.functional.pad(session.hidden.get(self.target.num_layers, no_hidden_BTD), (0, 0, 1, 0))
            ends_B = torch.tensor(lengths, device=before_BTD.device) - 1
            self._recycled_B1D = values_at(before_BTD, ends_B)[:, None]
            before_BTD = before_BTD[:, :-1]
        if config.num_blocks and session.hidden:
            x_BTD = self.entrance(session.hidden[config.exit_layer], before_BTD)
            self._trail.read(x_BTD, [length - 1 for length in lengths])

    def propose(self, budget: int) -> Draft:
        draft = growth.draft(self._logits, self._session, self.config, budget)
        # The last token of a chain has not been run yet; the nodes of a tree have been put in another order.
        self._num_in_place = 1 if self.config.width else draft.tree.num_nodes - 1
        self._draft = self._shallow.entered(draft, self._num_in_place)
        return self._draft

    def observe(self, step: Step) -> None:
        if self.config.num_blocks:
            hidden_BPD = gather_path(step.hidden[self.config.exit_layer], step.verdict)
            # Of another drafter's draft only node 0 is the same.
            in_place = self._num_in_place if step.is_of(self._draft) else min(self._num_in_place, 1)
            self._trail.keep(self.entrance(hidden_BPD, self._recycled_B1D), step.paths, in_place)
        if self.config.recycling:
            self._recycled_B1D = last_accepted_hidden(step, self.target.num_layers)[:, None]
        self._num_in_place = 0

    def _logits(self, tokens_BN: Tensor, tree: Tree, first: int) -> Tensor:
        """Returns the logits [B, M, V] after the nodes from `first` on."""
        x_BMD = self.entrance(self._shallow.run(tokens_BN, tree, first), self._recycled_B1D)
        if self.config.num_blocks:
            x_BMD = self._trail.run(x_BMD, tree, first)
        return self.head(self._normed(x_BMD))

    def _extra(self, x_BMD: Tensor, positions_BM: Tensor, mask_R1MS: Tensor, cache: KVCache) -> Tensor:
        for layer, block in enumerate(self.blocks):
            x_BMD = block(x_BMD, positions_BM, mask_R1NS=mask_R1MS, cache=cache, layer=layer)
        return x_BMD

    def _normed(self, x_BTD: Tensor) -> Tensor:
        return self.norm(x_BTD) if self.config.own_norm else self.target.norm(x_BTD)
