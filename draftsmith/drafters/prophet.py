"""A prophet: a small decoder that continues the text from the target's last hidden states.

After lucidrains/speculative-decoding. Every round it reads one short window: the states of the s positions before the
pending token x(t), then the tokens from x(t-s+1) on. States lag tokens by one, as the target has not read x(t) yet:
the state h(i), the target's output at x(i), is paired with x(i+1). For s = 2:

    slot     0        1        2        3        4        5     ...
    input    h(t-2)   h(t-1)   x(t-1)   x(t)     x(t+1)   x(t+2)
    predicts                            x(t+1)   x(t+2)   x(t+3)

From slot 4 on the tokens are drafted ones; in training they are the text's. States are taken after the target's final
norm. Slots before the start of the text are not attended to.

Shape suffixes: B rows or windows, S states of a window, Z = 2 S slots of its prefix, W slots, T tokens, N nodes,
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
from draftsmith.parts.checks import MAX_DEPTH, MAX_WIDTH, check_at_least
from draftsmith.parts.neural.layers import Block, ffn_width, gather_path, prepare_cache
from draftsmith.parts.neural.shortlist import SharedHead
from draftsmith.parts.neural.token_heads import untied_lm_heads
from draftsmith.parts.self_drafting.fine_tuned import FineTunedTarget, copy_with_own_parameters


@dataclass(frozen=True, kw_only=True)
class Config:
    """The shape of the decoder, its window, and the shape of drafts."""

    num_states: int = 2
    """Number of the target's hidden states in a window, and of the tokens after them up to the pending one."""
    num_draft: int = 7
    """Maximum number of tokens drafted per round."""
    num_layers: int = 2
    """Number of decoder blocks."""
    hidden_size: int = 0
    """Width of the decoder, 0 for the target's."""
    num_heads: int = 4
    """Attention heads of a block."""
    own_head: bool = False
    """Use an LM head of its own, initialised from the target's, instead of the target's."""
    shortlist: int = 0
    """If not 0, compute logits for this many tokens only (draftsmith/parts/neural/shortlist.py)."""
    length: str = "refit=0.4"
    """Draft-length policy of chains: a name of draftsmith/length/policies.py, and its number."""
    width: int = 0
    """If not 0, drafts are dynamic trees: the `width` likeliest nodes per level get `width` children each."""
    num_nodes: int = 16
    """Number of nodes kept in a dynamic tree."""
    joint: bool = False
    """Draft for a fine-tuned copy of the target, trained and saved with the drafter, instead of the user's."""

    def __post_init__(self) -> None:
        check_at_least(self, 1, "num_states", "num_layers", "num_heads", most=MAX_DEPTH)
        check_at_least(self, 0, "hidden_size", most=MAX_WIDTH)
        check_at_least(self, 0, "shortlist")
        if self.shortlist and (self.own_head or self.joint):
            raise ValueError(
                "a shortlist is of the frozen target's LM head, and own_head and joint replace that head: drop one"
            )
        autoregressive.check_shape(self)
        policies.make(self.length)

    @property
    def supports_early_stop(self) -> bool:
        return not self.width


class Drafter(nn.Module, drafter.Drafter):
    """The decoder, with maps between the target's width and its own; its cache is refilled every round.

    With a fine-tuned target, `target` is that one once weights are loaded, and `base` the user's.
    """

    row_state = ("_states_BSD",)
    base: Target
    tuned_model: Any

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
        self.shared_head = SharedHead(target, config.shortlist)
        if config.joint:
            # Only the copy's parameters belong to the drafter: a change of dtype must not affect its buffers.
            object.__setattr__(self, "tuned_model", copy_with_own_parameters(target.model))
            self.weights = nn.ParameterList(self.tuned_model.parameters())
        self.to(device=target.device, dtype=target.dtype)

    @property
    def fine_tunes_target(self) -> bool:
        return self.config.joint

    def on_weights_loaded(self) -> None:
        """Sets `target` to the fine-tuned target, if there is one."""
        if self.config.joint:
            object.__setattr__(self, "target", FineTunedTarget(self.tuned_model, self.base))

    def forward(self, normed_BSD: Tensor, tokens_BT: Tensor, is_present_BZ: Tensor) -> Tensor:
        """Returns the input of `head` at every slot from the pending token on [B, T - S + 1, E], for windows of a text.

        Their tokens continue past the pending one; `is_present_BZ` is False for prefix slots before the text's start.
        """
        x_BWE = torch.cat([self.state_map(normed_BSD), self.embed(tokens_BT)], dim=1)
        num_slots, num_before = x_BWE.shape[1], is_present_BZ.shape[1] - 1
        tree = chain(num_slots, x_BWE.device)
        mask_B1WW = window_mask(tree.ancestors_RNN[:, None], is_present_BZ)
        return self._run(x_BWE, tree.depths_RN, mask_B1WW)[:, num_before:]

    def embed(self, tokens_BT: Tensor) -> Tensor:
        """Returns the decoder's inputs [B, T, E] for tokens, with no gradient to the target's embedding."""
        return self.token_map(self.target.model.get_input_embeddings()(tokens_BT).detach())

    def output(self, z_BNE: Tensor) -> Tensor:
        """Returns the input of the LM head [..., D]."""
        return self.output_map(self.norm(z_BNE))

    def head(self, z_BNE: Tensor) -> Tensor:
        """Returns logits [B, N, V]."""
        out_BND = self.output(z_BNE)
        if self.config.own_head:
            return self.outputs[0](out_BND)
        return self.shared_head(out_BND) if self._shares_head else self.target.head(out_BND)

    @property
    def _shares_head(self) -> bool:
        return not self.config.own_head and not self.config.joint

    def _listed(self, z_BNE: Tensor) -> Tensor:
        return self.shared_head.listed(self.output(z_BNE)) if self._shares_head else self.head(z_BNE)

    def start(self, session: Session) -> None:
        self._session = session
        num_rows, device = len(session.rows), self.target.device
        self._cache = KVCache(num_layers=self.config.num_layers, batch_size=num_rows)
        pending_B = torch.tensor([len(row) - 1 for row in session.rows], device=device)
        positions_BS, _ = window_positions(pending_B, self.config.num_states)
        no_hidden_BTD = torch.zeros(num_rows, 1, self.target.hidden_size, device=device, dtype=self.target.dtype)
        hidden_BTD = session.hidden.get(self.hidden_layers[0], no_hidden_BTD)
        self._states_BSD = _at(hidden_BTD, positions_BS.clamp(min=0))

    def propose(self, budget: int) -> Draft:
        vocabulary = self.shared_head.shortlist if self._shares_head else None
        return autoregressive.draft(self._logits, self._session, self.config, budget, vocabulary)

    def observe(self, step: Step) -> None:
        path_BPD = gather_path(step.hidden[self.hidden_layers[0]], step.verdict)
        known_BND = torch.cat([self._states_BSD, path_BPD], dim=1)
        num_new_B1 = step.verdict.num_accepted_B[:, None] + 1
        order_S = torch.arange(self.config.num_states, device=num_new_B1.device)
        self._states_BSD = _at(known_BND, num_new_B1 + order_S)

    def _logits(self, tokens_BN: Tensor, tree: Tree, first: int) -> Tensor:
        """Returns the logits [B, M, W] after the nodes from `first` on; node 0 begins a new window."""
        if first > 0:
            return self._listed(self._read(self.embed(tokens_BN[:, first:]), tree, first))
        num_states, rows, device = self.config.num_states, self._session.rows, self.target.device
        tokens_BS = torch.tensor([[0] * (num_states - len(row)) + row[-num_states:] for row in rows], device=device)
        pending_B = torch.tensor([len(row) - 1 for row in rows], device=device)
        self._is_present_BZ = torch.cat(window_positions(pending_B, num_states), dim=1) >= 0
        normed_BSD = self.target.norm(self._states_BSD)
        x_BWE = torch.cat([self.state_map(normed_BSD), self.embed(tokens_BS)], dim=1)
        self._cache.lengths = [0] * len(rows)
        z_BWE = self._read(x_BWE, chain(2 * num_states, device), 0)
        # The pending token is node 0 of the draft; the slots before it are committed.
        self._cache.commit([list(range(2 * num_states - 1)) for _ in rows])
        return self._listed(z_BWE[:, -1:])

    def _read(self, x_BME: Tensor, tree: Tree, first: int) -> Tensor:
        positions_BM, mask_R1MW = prepare_cache(tree, self._cache, first=first)
        return self._run(x_BME, positions_BM, window_mask(mask_R1MW, self._is_present_BZ), self._cache)

    def _run(self, x_BWE: Tensor, positions_RW: Tensor, mask_B1WW: Tensor, cache: KVCache | None = None) -> Tensor:
        for layer, block in enumerate(self.blocks):
            x_BWE = block(x_BWE, positions_RW, mask_R1NS=mask_B1WW, cache=cache, layer=layer)
        return x_BWE


def window_positions(pending_B: Tensor, num_states: int) -> tuple[Tensor, Tensor]:
    """Returns the positions of each window's states, and of its tokens up to the pending one, both [B, S].

    Negative positions lie before the start of the text.
    """
    states_BS = pending_B[:, None] - num_states + torch.arange(num_states, device=pending_B.device)
    return states_BS, states_BS + 1


def window_mask(mask_R1MW: Tensor, is_present_BZ: Tensor) -> Tensor:
    """Returns the attention mask [B, 1, M, W] of the last M of W slots, which hides prefix slots that are not present.

    A slot that is not present attends to itself, because attention to no slot is undefined.
    """
    num_new, num_slots = mask_R1MW.shape[2:]
    is_present_BW = functional.pad(is_present_BZ, (0, num_slots - is_present_BZ.shape[1]), value=True)
    own_MW = torch.eye(num_slots, dtype=torch.bool, device=mask_R1MW.device)[-num_new:]
    return mask_R1MW & is_present_BW[:, None, None] | own_MW


def _at(values_BTD: Tensor, index_BS: Tensor) -> Tensor:
    """Returns each row's values [B, S, D] at its own indices."""
    return values_BTD.gather(1, index_BS[..., None].expand(-1, -1, values_BTD.shape[-1]))


def _map(width_in: int, width_out: int) -> nn.Linear:
    """Returns a linear map initialised as the identity, or with random weights if the widths differ."""
    linear = nn.Linear(width_in, width_out, bias=False)
    if width_in == width_out:
        nn.init.eye_(linear.weight)
    return linear
