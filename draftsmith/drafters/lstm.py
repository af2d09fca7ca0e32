"""A small LSTM between the target's embedding and LM head, drafting chains or trees.

Its shape is that of AWD-LSTM (1708.02182); the regularisation is in trainers/lstm.py. It is rewound to any token by the
state there. For an encoder-decoder target its initial state is a map of the mean source state, and it attends to the
source after each token (draftsmith/parts/neural/cross_attention.py).

Shape suffixes: B rows, T tokens, L layers, H width, E width of the target's embedding, G = 4 H gates.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from draftsmith.core import drafter
from draftsmith.core.drafter import Session, Step
from draftsmith.core.target import Source, Target
from draftsmith.core.tree import Draft
from draftsmith.length import policies
from draftsmith.parts import autoregressive
from draftsmith.parts.checks import MAX_DEPTH, MAX_WIDTH, check_at_least
from draftsmith.parts.neural.cross_attention import CrossAttention, ProjectedSource
from draftsmith.parts.neural.former_names import accept_former_names
from draftsmith.parts.neural.recurrent import RecurrentDraftState, State
from draftsmith.parts.neural.shortlist import Shortlist, WeightCache
from draftsmith.parts.neural.tied_heads import TiedHead


@dataclass(frozen=True, kw_only=True)
class Config:
    """The shape of the network and of drafts."""

    hidden_size: int = 512
    """Width of its layers."""
    num_layers: int = 1
    """Number of layers."""
    rank: int = 256
    """Rank of the map from features to logits, if the target's LM head is wider than that."""
    shortlist: int = 0
    """If not 0, compute logits for this many tokens only (draftsmith/parts/neural/shortlist.py)."""
    copy: bool = False
    """Mix the next-token distribution with copies from an encoder-decoder target's source."""
    num_draft: int = 8
    """Maximum number of tokens drafted per round."""
    length: str = "refit=0.4"
    """Draft-length policy of chains: a name of draftsmith/length/policies.py, and its number."""
    width: int = 0
    """If not 0, drafts are dynamic trees: the `width` likeliest nodes per level get `width` children each."""
    num_nodes: int = 16
    """Number of nodes kept in a dynamic tree."""

    def __post_init__(self) -> None:
        check_at_least(self, 1, "hidden_size", "rank", most=MAX_WIDTH)
        check_at_least(self, 1, "num_layers", most=MAX_DEPTH)
        check_at_least(self, 0, "shortlist")
        if self.copy and self.shortlist:
            raise ValueError("give either copy or a shortlist, not both: copied tokens need not be on the shortlist")
        autoregressive.check_shape(self)
        policies.make(self.length)

    @property
    def supports_early_stop(self) -> bool:
        return not self.width


class _LSTM(nn.LSTM):
    """An LSTM that runs in half precision on every CPU: oneDNN's fails on some shapes without AVX-512."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        weight: Any = self.weight_ih_l0
        is_half = weight.dtype != torch.float32 or torch.is_autocast_enabled("cpu")
        if weight.is_cuda or not is_half or torch.cpu._is_avx512_bf16_supported():
            return super().forward(*args, **kwargs)
        with torch.backends.mkldnn.flags(enabled=False):
            return super().forward(*args, **kwargs)


class Drafter(nn.Module, drafter.Drafter):
    """The network; its state is (h, c) of each layer, each [B, H]."""

    row_state = ("_state",)
    serving_engines = ("vllm",)

    def __init__(self, config: Config, target: Target) -> None:
        super().__init__()
        self.config = config
        object.__setattr__(self, "target", target)
        self.tied_head = TiedHead(target, config.hidden_size, config.rank, shortlist=config.shortlist)
        self.layers = _LSTM(self.tied_head.input_width, config.hidden_size, config.num_layers, batch_first=True)
        summary_width = config.num_layers * config.hidden_size
        self.cross_attention = CrossAttention(target, config.hidden_size, summary_width, copies=config.copy)
        self.to(device=target.device, dtype=target.dtype)
        self._folded = WeightCache(self, self._fold)
        accept_former_names(self, {"ends": "tied_head", "reader": "cross_attention"})

    def forward(
        self, tokens_BT: Tensor, source: Source | None = None, *, dropout: float = 0.0, drop_connect: float = 0.0
    ) -> Tensor:
        """Returns the features [B, T, ...] after each token, the input of `head`.

        In training `dropout` zeroes inputs and features, the same ones at all positions of a row, and `drop_connect`
        zeroes weights between one position and the next (1708.02182, sections 2 and 4.1).
        """
        layers, inputs_BTE = self.layers, dropped(self.tied_head.embed(tokens_BT), dropout)
        projected = self.cross_attention.project(source)
        inputs = (inputs_BTE, self._initial_state(projected, inputs_BTE))
        if not drop_connect:
            return self.cross_attention.attend(dropped(layers(*inputs)[0], dropout), projected)
        dropped_weights = {
            name: nn.functional.dropout(weight, drop_connect)
            for name, weight in layers.named_parameters()
            if name.startswith("weight_hh")
        }
        features_BTH, _ = torch.func.functional_call(layers, dropped_weights, inputs)
        return self.cross_attention.attend(dropped(features_BTH, dropout), projected)

    def head(self, source: Source | None = None) -> Callable[[Tensor], Tensor]:
        """Returns the map from features, with this source, [..., X] to logits [..., V]."""
        return self.cross_attention.copy_head(self.tied_head.head, source)

    # Drafting

    def start(self, session: Session) -> None:
        self._folded()
        self._source = self.cross_attention.project(session.source)
        self._logits = self.cross_attention.copy_head(self._head, session.source)
        self._state = RecurrentDraftState(self, session, self.config)

    def change_rows(self, origins: list[int | None], new: Session | None) -> bool:
        # An encoder-decoder's projected sources are of the rows before.
        return not self.target.is_encoder_decoder and super().change_rows(origins, new)

    def propose(self, budget: int) -> Draft:
        return self._state.propose(budget)

    def observe(self, step: Step) -> None:
        self._state.observe(step)

    def rewind(self, lengths: list[int]) -> bool:
        """Drops each row's state past its first `lengths` tokens."""
        self._state.rewind(lengths)
        return True

    # RecurrentNetwork

    @property
    def vocabulary(self) -> Shortlist:
        return self.tied_head.shortlist

    def read(self, tokens_BT: Tensor, lengths: list[int]) -> State:
        inputs_BTE = self.tied_head.embed(tokens_BT)
        initial = self._initial_state(self._source, inputs_BTE)
        found: State = initial
        if any(lengths):
            packed = pack_padded_sequence(inputs_BTE, torch.tensor(lengths).clamp(min=1), True, enforce_sorted=False)
            has_read_B1 = torch.tensor(lengths, device=tokens_BT.device)[:, None] > 0
            both = zip(self.layers(packed, initial)[1], initial, strict=True)
            found = tuple(torch.where(has_read_B1, now, before) for now, before in both)
        return tuple(part for pair in zip(*found, strict=True) for part in pair)

    def step(self, tokens_B: Tensor, state: State) -> tuple[Tensor, State]:
        found: list[Tensor] = []
        gates_BG = self._inputs(tokens_B)
        for layer, (recurrent_HG, next_input) in enumerate(self._weights):
            h_BH, c_BH = cell(torch.addmm(gates_BG, state[2 * layer], recurrent_HG), state[2 * layer + 1])
            found += [h_BH, c_BH]
            if next_input is not None:
                gates_BG = torch.addmm(next_input[1], h_BH, next_input[0])
        return self.cross_attention.attend(found[-2], self._source), tuple(found)

    def logits(self, features: Tensor) -> Tensor:
        return self._logits(features)

    def _initial_state(self, source: ProjectedSource | None, inputs_BTE: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the state (h, c) before the text, each [L, B, H]: zeros, or the source's summary as c."""
        if source is None:
            zeros_LBH = inputs_BTE.new_zeros(self.config.num_layers, len(inputs_BTE), self.config.hidden_size)
            return zeros_LBH, zeros_LBH
        c_LBH = source.summary_BG.unflatten(1, (self.config.num_layers, -1)).transpose(0, 1).contiguous()
        return c_LBH.tanh(), c_LBH

    @torch.no_grad()
    def _fold(self) -> None:
        """Arranges the weights for single steps, the gates in the order of `cell`."""
        size, layers = self.config.hidden_size, self.layers
        # PyTorch's order is input, forget, candidate, output.
        order_G = torch.arange(4 * size, device=self.target.device).view(4, size)[[0, 1, 3, 2]].flatten()
        inputs, recurrent = [], []
        for layer in range(self.config.num_layers):
            from_below, from_before, *biases = (
                getattr(layers, f"{name}_l{layer}")[order_G]
                for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            )
            inputs.append((from_below.T.contiguous(), biases[0] + biases[1]))
            recurrent.append(from_before.T.contiguous())
        first_EG, first_bias_G = inputs[0]
        self._inputs = self.tied_head.folded_input(first_EG.T, first_bias_G)
        self._weights = list(zip(recurrent, [*inputs[1:], None], strict=True))
        self._head = self.tied_head.folded_head()


def cell(gates_BG: Tensor, c_BH: Tensor) -> tuple[Tensor, Tensor]:
    """Returns h = o tanh(c') and c' = f c + i tanh(g), the gates given as i, f, o, g before their non-linearities."""
    size = c_BH.shape[1]
    input_BH, forget_BH, output_BH = gates_BG[:, : 3 * size].sigmoid().chunk(3, dim=1)
    c_BH = torch.addcmul(forget_BH * c_BH, input_BH, gates_BG[:, 3 * size :].tanh())
    return output_BH * c_BH.tanh(), c_BH


def dropped(x_BTE: Tensor, rate: float) -> Tensor:
    """Returns x with dropout of the same entries at all positions of a row (1512.05287)."""
    return x_BTE * nn.functional.dropout(torch.ones_like(x_BTE[:, :1]), rate) if rate else x_BTE
