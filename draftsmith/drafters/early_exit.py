"""Early exit: the target's first blocks draft, with its own norm and LM head or trained ones (LayerSkip, 2404.16710).

Those blocks run over the draft in the target's own cache, and verification resumes after them. Extra blocks and
recycling of the target's last hidden state follow lucidrains/speculative-decoding.

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
from draftsmith.parts import autoregressive
from draftsmith.parts.checks import MAX_DEPTH, MAX_WIDTH, check_at_least, check_positive
from draftsmith.parts.neural.layers import Block, ffn_width, gather_path
from draftsmith.parts.neural.shortlist import SharedHead
from draftsmith.parts.neural.token_heads import last_accepted_hidden, untied_lm_heads
from draftsmith.parts.self_drafting.early_exit import DrafterCache, EarlyExitRunner, check_exit_layer
from draftsmith.parts.self_drafting.fine_tuned import (
    Adapter,
    FineTunedTarget,
    copy_with_own_parameters,
    fine_tuned_target,
    linear_layers,
    merged_weights,
)
from draftsmith.verify.paths import values_at


@dataclass(frozen=True, kw_only=True)
class Config:
    """The exit layer, the layers between it and the logits, and the shape of drafts."""

    exit_layer: int = 2
    """Number of the target's blocks that draft tokens run through."""
    num_blocks: int = 0
    """Number of extra decoder blocks after the exit."""
    num_heads: int = 4
    """Attention heads of an extra block."""
    inner_width: int = 0
    """Inner width of an extra block's MLP, 0 for 8/3 of the target's width."""
    own_norm: bool = True
    """Use a norm of its own before the LM head, initialised from the target's, instead of the target's."""
    own_head: bool = False
    """Use an LM head of its own, initialised from the target's, instead of the target's."""
    shortlist: int = 0
    """If not 0, compute logits for this many tokens only (draftsmith/parts/neural/shortlist.py)."""
    recycling: bool = False
    """Add the last hidden state of the last verified token, through a matrix, to the exit layer."""
    tunes: bool = False
    """Draft for a fine-tuned target, trained for the early exit and saved with the drafter, instead of the user's."""
    rank: int = 0
    """Rank of the low-rank change of each of that target's layers; 0 to fine-tune all of its weights."""
    alpha: float = 16.0
    """Scale of a low-rank change: alpha / rank times the product of its factors."""
    modules: tuple[str, ...] = ()
    """Last parts of the names of the linear layers with a low-rank change, such as q_proj; if empty, all in the
    target's blocks and its LM head."""
    num_draft: int = 6
    """Maximum number of tokens drafted per round."""
    length: str = "confidence=0.6"
    """Draft-length policy of chains: a name of draftsmith/length/policies.py, and its number."""
    width: int = 0
    """If not 0, drafts are dynamic trees: the `width` likeliest nodes per level get `width` children each."""
    num_nodes: int = 16
    """Number of nodes kept in a dynamic tree."""

    def __post_init__(self) -> None:
        check_at_least(self, 1, "exit_layer", "num_heads", most=MAX_DEPTH)
        check_at_least(self, 0, "num_blocks", most=MAX_DEPTH)
        check_at_least(self, 0, "shortlist")
        if self.shortlist and (self.own_head or self.tunes):
            raise ValueError(
                "a shortlist is of the frozen target's LM head, and own_head and tunes replace that head: drop one"
            )
        check_at_least(self, 0, "inner_width", "rank", most=MAX_WIDTH)
        check_positive(self, "alpha")
        if not self.tunes and (self.rank or self.modules):
            raise ValueError("rank and modules are settings of a fine-tuned target; set tunes as well, or neither")
        autoregressive.check_shape(self)
        policies.make(self.length)

    @property
    def supports_early_stop(self) -> bool:
        return not self.width


class Drafter(nn.Module, drafter.Drafter):
    """Computes head(norm(blocks(h + R r))), h the exit layer and r the last verified hidden state.

    With a fine-tuned target, `target` is that one once weights are loaded, and `base` the user's.
    """

    row_state = ("_cache", "_recycled_B1D")
    serving_engines = ("vllm", "sglang", "llama.cpp", "openvino")
    base: Target
    _tuned_model: Any

    def __init__(self, config: Config, target: Target) -> None:
        super().__init__()
        check_exit_layer(config.exit_layer, target, width=config.width)
        self.config = config
        object.__setattr__(self, "base", target)
        object.__setattr__(self, "target", target)
        width, last = target.hidden_size, target.num_layers
        layers = {last} if config.recycling else set()
        self.hidden_layers = tuple(sorted(layers | ({config.exit_layer} if config.num_blocks else set())))
        inner_width = config.inner_width or ffn_width(width)
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
        self.shared_head = SharedHead(target, config.shortlist)
        if config.tunes and config.rank:
            self.adapters = nn.ModuleList(
                Adapter(layer, config.rank) for layer in linear_layers(target, config.modules).values()
            )
        elif config.tunes:
            # Only the copy's parameters belong to the drafter: a change of dtype must not affect its buffers.
            object.__setattr__(self, "_tuned_model", copy_with_own_parameters(target.model))
            self.weights = nn.ParameterList(self._tuned_model.parameters())
        self.to(device=target.device, dtype=target.dtype)

    @property
    def fine_tunes_target(self) -> bool:
        return self.config.tunes

    def on_weights_loaded(self) -> None:
        """Sets `target` to the fine-tuned target, if there is one."""
        config = self.config
        if config.tunes and config.rank:
            weights = merged_weights(self.base, config.modules, self.adapters, scale=config.alpha / config.rank)
            object.__setattr__(self, "target", fine_tuned_target(self.base, weights))
        elif config.tunes:
            object.__setattr__(self, "target", FineTunedTarget(self._tuned_model, self.base))

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Returns the input of the LM head [B, T, D] over whole texts."""
        positions_1T = torch.arange(x_BTD.shape[1], device=x_BTD.device)[None]
        for block in self.blocks:
            x_BTD = block(x_BTD, positions_1T)
        return self._normed(x_BTD)

    def block_input(self, hidden_BTD: Tensor, recycled_BTD: Tensor | None) -> Tensor:
        """Returns h + R norm(r) [B, T, D], r the recycled last hidden state of the target; h if it is None."""
        if recycled_BTD is None:
            return hidden_BTD
        return hidden_BTD + self.recycle(self.target.norm(recycled_BTD))

    def head(self, normed_BTD: Tensor) -> Tensor:
        """Returns logits [B, T, V]."""
        if self.config.own_head:
            return self.output(normed_BTD)
        return self.shared_head(normed_BTD) if self._shares_head else self.target.head(normed_BTD)

    @property
    def _shares_head(self) -> bool:
        return not self.config.own_head and not self.config.tunes

    def start(self, session: Session) -> None:
        config, lengths = self.config, [len(row) for row in session.rows]
        self._session, self._exit = session, EarlyExitRunner(session, config.exit_layer)
        self._cache = DrafterCache(self._cached_layers, config.num_blocks, len(lengths))
        before_BTD, self._recycled_B1D = None, None
        if config.recycling:
            # Each prompt token is treated as if it were drafted right after the token before it had been verified.
            no_hidden_BTD = self.recycle.weight.new_zeros(len(lengths), 0, self.target.hidden_size)
            before_BTD = nn.functional.pad(session.hidden.get(self.target.num_layers, no_hidden_BTD), (0, 0, 1, 0))
            pending_B = torch.tensor(lengths, device=before_BTD.device) - 1
            self._recycled_B1D = values_at(before_BTD, pending_B)[:, None]
            before_BTD = before_BTD[:, :-1]
        if config.num_blocks and session.hidden:
            x_BTD = self.block_input(session.hidden[config.exit_layer], before_BTD)
            self._cache.read(x_BTD, [length - 1 for length in lengths])

    def propose(self, budget: int) -> Draft:
        vocabulary = self.shared_head.shortlist if self._shares_head else None
        draft = autoregressive.draft(self._logits, self._session, self.config, budget, vocabulary)
        return self._exit.with_resume_point(draft, is_reordered=bool(self.config.width))

    def observe(self, step: Step) -> None:
        if self.config.num_blocks:
            hidden_BPD = gather_path(step.hidden[self.config.exit_layer], step.verdict)
            x_BPD = self.block_input(hidden_BPD, self._recycled_B1D)
            self._cache.keep(x_BPD, step.paths, self._exit.accepted(step))
        if self.config.recycling:
            self._recycled_B1D = last_accepted_hidden(step, self.target.num_layers)[:, None]

    def _logits(self, tokens_BN: Tensor, tree: Tree, first: int) -> Tensor:
        """Returns the logits [B, M, W] after the nodes from `first` on."""
        x_BMD = self.block_input(self._exit.run(tokens_BN, tree, first), self._recycled_B1D)
        if self.config.num_blocks:
            x_BMD = self._cache.run(x_BMD, tree, first)
        normed_BMD = self._normed(x_BMD)
        return self.shared_head.listed(normed_BMD) if self._shares_head else self.head(normed_BMD)

    def _cached_layers(self, x_BMD: Tensor, positions_BM: Tensor, mask_R1MS: Tensor, cache: KVCache) -> Tensor:
        for layer, block in enumerate(self.blocks):
            x_BMD = block(x_BMD, positions_BM, mask_R1NS=mask_R1MS, cache=cache, layer=layer)
        return x_BMD

    def _normed(self, x_BTD: Tensor) -> Tensor:
        return self.norm(x_BTD) if self.config.own_norm else self.target.norm(x_BTD)
