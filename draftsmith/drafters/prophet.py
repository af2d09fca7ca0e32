"""A prophet: a small decoder that goes on where the target's last hidden states leave off.

After lucidrains/speculative-decoding. Every round it reads one short window: the states of the s positions before the
pending token x(t), then the tokens from x(t-s+1) on. States lag tokens by one, as the target has not read x(t) yet:
the state h(i), which the target made of x(i), comes with x(i+1). For s = 2:

    slot    0        1        2        3        4        5     ...
    input   h(t-2)   h(t-1)   x(t-1)   x(t)     x(t+1)   x(t+2)
    says                               x(t+1)   x(t+2)   x(t+3)

From slot 4 on the tokens are drafted ones; in training they are the text's. A state is given as the target's head reads
it, through the target's final norm. What a text's start leaves empty is not attended to.

Shape suffixes: B rows or windows, S states of a window, Z = 2 S slots that it begins with, W slots, T tokens, N nodes,
M new nodes, P length of the longest accepted path, D the target's hidden width, E the prophet's, V vocabulary, R is B
or 1.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from draftsmith.core import drafter
from draftsmith.core.cache import KVCache
from draftsmith.core.drafter import Session, Step
from draftsmith.core.target import Target
from draftsmith.core.tree import Draft, Tree, chain
from draftsmith.length import policies
from draftsmith.parts import autoregressive
from draftsmith.parts.neural.layers import Block, ffn_width, gather_path, prepare_cache
from draftsmith.parts.neural.token_heads import untied_lm_heads
from draftsmith.parts.self_drafting.fine_tuned import FineTunedTarget, copy_with_own_parameters


@dataclass(frozen=True, kw_only=True)
class Config:
    """The decoder, its window, and the shape of its drafts."""

    num_states: int = 2
    """Hidden states of the target that a window begins with, and tokens that follow them, the pending one the last."""
    num_draft: int = 7
    """Most tokens drafted at a time."""
    num_layers: int = 2
    """Blocks of the decoder."""
    hidden_size: int = 0
    """Its width, 0 for the target's."""
    num_heads: int = 4
    """Its attention heads."""
    own_head: bool = False
    """Whether it has an output matrix of its own, started as a copy of the target's, or uses the target's head."""
    length: str = "refit=0.4"
    """How long its chains are: a policy of draftsmith/length/policies.py, and its number."""
    width: int = 0
    """If not 0, trees grow where the prophet is confident: so many nodes a level are given so many children."""
    num_nodes: int = 16
    """Nodes kept of such a tree."""
    joint: bool = False
    """Whether it comes with a changed target: a copy of the user's that was trained with it, and that it drafts for."""

    def __post_init__(self) -> None:
        for name in ("num_states", "num_layers", "num_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.hidden_size < 0:
            raise ValueError(f"hidden_size is {self.hidden_size}; it must not be negative")
        autoregressive.check_shape(self)
        policies.make(self.length)

    @property
    def supports_early_stop(self) -> bool:
        return not self.width


class Drafter(nn.Module, drafter.Drafter):
    """The decoder, with maps from the target's width into its own and back; its cache is filled anew every round."""

    base: Target
    changed: Any

    def __init__(self, config: Config, target: Target) -> None:
        super().__init__()
        self.config = config
        object.__setattr__(self, "base", target)
        object.__setattr__(self, "target", target)
        self.hidden_layers = (target.num_layers,)
        width = config.hidden_size or target.hidden_size
        self.state_map = _map(target.hidden_size, width)
        self.token_map = _map(target.hidden_size, width)
        self.blocks = nn.ModuleList(
            Block(width, num_heads=config.num_heads, inner_width=ffn_width(width)) for _ in range(config.num_layers)
        )
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.output_map = _map(width, target.hidden_size)
        if config.own_head:
            self.outputs = untied_lm_heads(target, 1)
        if config.joint:
            # Of the copy only the parameters are the drafter's: a change of dtype must not touch its buffers.
            object.__setattr__(self, "changed", copy_with_own_parameters(target.model))
            self.weights = nn.ParameterList(self.changed.parameters())
        self.to(device=target.device, dtype=target.dtype)

    @property
    def fine_tunes_target(self) -> bool:
        return self.config.joint

    def on_weights_loaded(self) -> None:
        """Makes `target` the changed one, if it comes with one."""
        if self.config.joint:
            object.__setattr__(self, "target", FineTunedTarget(self.changed, self.base))

    def forward(self, normed_BSD: Tensor, tokens_BT: Tensor, is_there_BZ: Tensor) -> Tensor:
        """Returns what `head` reads at every slot from the pending token on [B, T - S + 1, E], of windows of a text.

        Their tokens go on past the pending one; `is_there_BZ` says which states and tokens up to it there are.
        """
        x_BWE = torch.cat([self.state_map(normed_BSD), self.embed(tokens_BT)], dim=1)
        num_slots, num_before = x_BWE.shape[1], is_there_BZ.shape[1] - 1
        tree = chain(num_slots, x_BWE.device)
        mask_B1WW = shown(tree.ancestors_RNN[:, None], is_there_BZ)
        return self._run(x_BWE, tree.depths_RN, mask_B1WW)[:, num_before:]

    def embed(self, tokens_BT: Tensor) -> Tensor:
        """Returns the prophet's inputs [B, T, E] for tokens; the target's embedding learns nothing from them."""
        return self.token_map(self.target.model.get_input_embeddings()(tokens_BT).detach())

    def head(self, z_BNE: Tensor) -> Tensor:
        """Returns logits [B, N, V]."""
        out_BND = self.output_map(self.norm(z_BNE))
        return self.outputs[0](out_BND) if self.config.own_head else self.target.head(out_BND)

    def start(self, session: Session) -> None:
        self._session = session
        num_rows, device = len(session.rows), self.target.device
        self._cache = KVCache(num_layers=self.config.num_layers, batch_size=num_rows)
        pending_B = torch.tensor([len(row) - 1 for row in session.rows], device=device)
        places_BS, _ = places(pending_B, self.config.num_states)
        nothing_BTD = torch.zeros(num_rows, 1, self.target.hidden_size, device=device, dtype=self.target.dtype)
        hidden_BTD = session.hidden.get(self.hidden_layers[0], nothing_BTD)
        self._states_BSD = _at(hidden_BTD, places_BS.clamp(min=0))

    def propose(self, budget: int) -> Draft:
        return autoregressive.draft(self._logits, self._session, self.config, budget)

    def observe(self, step: Step) -> None:
        path_BPD = gather_path(step.hidden[self.hidden_layers[0]], step.verdict)
        known_BND = torch.cat([self._states_BSD, path_BPD], dim=1)
        num_new_B1 = step.verdict.num_accepted_B[:, None] + 1
        order_S = torch.arange(self.config.num_states, device=num_new_B1.device)
        self._states_BSD = _at(known_BND, num_new_B1 + order_S)

    def _logits(self, tokens_BN: Tensor, tree: Tree, first: int) -> Tensor:
        """Returns the logits [B, M, V] after the nodes from `first` on; for node 0 a new window is begun."""
        if first > 0:
            return self.head(self._read(self.embed(tokens_BN[:, first:]), tree, first))
        num_states, rows, device = self.config.num_states, self._session.rows, self.target.device
        tokens_BS = torch.tensor([[0] * (num_states - len(row)) + row[-num_states:] for row in rows], device=device)
        pending_B = torch.tensor([len(row) - 1 for row in rows], device=device)
        self._is_there_BZ = torch.cat(places(pending_B, num_states), dim=1) >= 0
        normed_BSD = self.target.norm(self._states_BSD)
        x_BWE = torch.cat([self.state_map(normed_BSD), self.embed(tokens_BS)], dim=1)
        self._cache.lengths = [0] * len(rows)
        z_BWE = self._read(x_BWE, chain(2 * num_states, device), 0)
        # The pending token is node 0 of what follows; what comes before it stays.
        self._cache.commit([list(range(2 * num_states - 1)) for _ in rows])
        return self.head(z_BWE[:, -1:])

    def _read(self, x_BME: Tensor, tree: Tree, first: int) -> Tensor:
        positions_BM, mask_R1MW = prepare_cache(tree, self._cache, first=first)
        return self._run(x_BME, positions_BM, shown(mask_R1MW, self._is_there_BZ), self._cache)

    def _run(self, x_BWE: Tensor, positions_RW: Tensor, mask_B1WW: Tensor, cache: KVCache | None = None) -> Tensor:
        for layer, block in enumerate(self.blocks):
            x_BWE = block(x_BWE, positions_RW, mask_R1NS=mask_B1WW, cache=cache, layer=layer)
        return x_BWE


def places(pending_B: Tensor, num_states: int) -> tuple[Tensor, Tensor]:
    """Returns where in its text each window's states and its tokens up to the pending one stand, both [B, S].

    A place below 0 is empty.
    """
    states_BS = pending_B[:, None] - num_states + torch.arange(num_states, device=pending_B.device)
    return states_BS, states_BS + 1


def shown(mask_R1MW: Tensor, is_there_BZ: Tensor) -> Tensor:
    """Returns the mask [B, 1, M, W] of the last M of W slots, without those of the first that are not there.

    A slot that is not there sees itself, as attention to nothing has no value.
    """
    num_new, num_slots = mask_R1MW.shape[2:]
    is_there_BW = functional.pad(is_there_BZ, (0, num_slots - is_there_BZ.shape[1]), value=True)
    own_MW = torch.eye(num_slots, dtype=torch.bool, device=mask_R1MW.device)[-num_new:]
    return mask_R1MW & is_there_BW[:, None, None] | own_MW


def _at(values_BTD: Tensor, index_BS: Tensor) -> Tensor:
    """Returns each row's values [B, S, D] at its own indices."""
    return values_BTD.gather(1, index_BS[..., None].expand(-1, -1, values_BTD.shape[-1]))


def _map(width_in: int, width_out: int) -> nn.Linear:
    """Returns a linear map that changes nothing at first, or one with random weights where the widths differ."""
    linear = nn.Linear(width_in, width_out, bias=False)
    if width_in == width_out:
        nn.init.eye_(linear.weight)
    return linear
