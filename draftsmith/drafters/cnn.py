"""Causal gated convolutions between the target's embedding and LM head, drafting chains or trees.

x = x + (W * x + b) sigmoid(U * x + c) in each layer, over the last `kernel_size` inputs, `dilation` apart (1612.08083,
equation 1; residual as in its section 2). It is rewound to any token by the past inputs that each layer kept there. For
an encoder-decoder target the mean source state is added to each input, and the features after each token attend to the
source (draftsmith/parts/neural/cross_attention.py).

Shape suffixes: B rows, T tokens, C channels, K kernel, S past inputs of a layer, G = 2 C.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from draftsmith.core import drafter
from draftsmith.core.drafter import Session, Step
from draftsmith.core.target import Source, Target
from draftsmith.core.tree import Draft
from draftsmith.length import policies
from draftsmith.parts import autoregressive
from draftsmith.parts.checks import MAX_DEPTH, MAX_WIDTH, check_at_least, check_each
from draftsmith.parts.neural.cross_attention import CrossAttention, ProjectedSource
from draftsmith.parts.neural.former_names import accept_former_names
from draftsmith.parts.neural.recurrent import RecurrentDraftState, State
from draftsmith.parts.neural.shortlist import Shortlist, WeightCache
from draftsmith.parts.neural.tied_heads import TiedHead


@dataclass(frozen=True, kw_only=True)
class Config:
    """The shape of the network and of drafts."""

    num_channels: int = 256
    """Width of its layers."""
    kernel_size: int = 3
    """Number of inputs per output of a layer."""
    dilations: tuple[int, ...] = (1, 1, 2, 4)
    """Distance between these inputs, layer by layer."""
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
        check_at_least(self, 1, "num_channels", "rank", most=MAX_WIDTH)
        check_at_least(self, 0, "shortlist")
        if not 2 <= self.kernel_size <= MAX_DEPTH:
            raise ValueError(f"kernel_size is {self.kernel_size}; it must be 2, to include past inputs, to {MAX_DEPTH}")
        if not self.dilations or min(self.dilations) < 1:
            raise ValueError(f"dilations are {list(self.dilations)}; give one of at least 1 for each layer")
        check_each(self, 1, "dilations", most=MAX_WIDTH)
        if self.copy and self.shortlist:
            raise ValueError("give either copy or a shortlist, not both: copied tokens need not be on the shortlist")
        autoregressive.check_shape(self)
        policies.make(self.length)

    @property
    def supports_early_stop(self) -> bool:
        return not self.width


class Drafter(nn.Module, drafter.Drafter):
    """The network; its state is each layer's past inputs [B, S, C], zeros before the text begins."""

    row_state = ("_state",)
    serving_engines = ("vllm",)

    def __init__(self, config: Config, target: Target) -> None:
        super().__init__()
        self.config = config
        object.__setattr__(self, "target", target)
        size = config.num_channels
        self.tied_head = TiedHead(target, size, config.rank, shortlist=config.shortlist)
        self.input = nn.Linear(self.tied_head.input_width, size)
        # Taps are concatenated, the earliest first.
        self.layers = nn.ModuleList(nn.Linear(config.kernel_size * size, 2 * size) for _ in config.dilations)
        self.cross_attention = CrossAttention(target, size, size, copies=config.copy)
        self.to(device=target.device, dtype=target.dtype)
        self._folded = WeightCache(self, self._fold)
        accept_former_names(self, {"ends": "tied_head", "reader": "cross_attention"})

    def forward(self, tokens_BT: Tensor, source: Source | None = None, *, dropout: float = 0.0) -> Tensor:
        """Returns the features [B, T, ...] after each token, the input of `head`.

        In training `dropout` is applied to the inputs of layers.
        """
        projected = self.cross_attention.project(source)
        return self.cross_attention.attend(self._run(tokens_BT, projected, dropout)[0], projected)

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
        if not any(lengths):
            zeros_C = torch.zeros_like(self.input.bias)
            return tuple(zeros_C.expand(len(lengths), self._span(dilation), -1) for dilation in self.config.dilations)
        lengths_B1 = torch.tensor(lengths, device=tokens_BT.device)[:, None]
        rows_B1 = torch.arange(len(lengths), device=tokens_BT.device)[:, None]
        found = []
        for inputs_BCT in self._run(tokens_BT, self._source)[1]:
            num_past = inputs_BCT.shape[2] - tokens_BT.shape[1]
            slots_BS = lengths_B1 + torch.arange(num_past, device=tokens_BT.device)
            found.append(inputs_BCT.transpose(1, 2)[rows_B1, slots_BS])
        return tuple(found)

    def step(self, tokens_B: Tensor, state: State) -> tuple[Tensor, State]:
        x_BC, found = self._inputs(tokens_B), []
        if self._source is not None:
            summary_B1C = self._source.summary_BG[:, None]
            x_BC = (x_BC.view(len(summary_B1C), -1, x_BC.shape[1]) + summary_B1C).flatten(0, 1)
        for past_BSC, dilation, weight_KCG, bias_G in zip(state, self.config.dilations, *self._weights, strict=True):
            window_BSC = torch.cat([past_BSC, x_BC[:, None]], dim=1)
            taps_BKC = window_BSC[:, ::dilation].flatten(1)
            x_BC = x_BC + functional.glu(torch.addmm(bias_G, taps_BKC, weight_KCG), dim=1)
            found.append(window_BSC[:, 1:])
        return self.cross_attention.attend(x_BC, self._source), tuple(found)

    def logits(self, features: Tensor) -> Tensor:
        return self._logits(features)

    def _run(
        self, tokens_BT: Tensor, source: ProjectedSource | None, dropout: float = 0.0
    ) -> tuple[Tensor, list[Tensor]]:
        """Returns the features [B, T, C], and each layer's inputs [B, C, S + T], of which the first S are zeros."""
        x_BTC, inputs = self.input(self.tied_head.embed(tokens_BT)), []
        x_BCT = (x_BTC if source is None else x_BTC + source.summary_BG[:, None]).transpose(1, 2)
        for linear, dilation in zip(self._linears(), self.config.dilations, strict=True):
            kept_BCT = functional.dropout(x_BCT, dropout) if dropout else x_BCT
            inputs.append(functional.pad(kept_BCT, (self._span(dilation), 0)))
            weight_GCK = linear.weight.unflatten(1, (self.config.kernel_size, -1)).transpose(1, 2)
            gates_BGT = functional.conv1d(inputs[-1], weight_GCK, linear.bias, dilation=dilation)
            x_BCT = x_BCT + functional.glu(gates_BGT, dim=1)
        return x_BCT.transpose(1, 2), inputs

    @torch.no_grad()
    def _fold(self) -> None:
        """Arranges the weights for single steps."""
        self._inputs = self.tied_head.folded_input(self.input.weight, self.input.bias)
        self._weights = (
            [linear.weight.T.contiguous() for linear in self._linears()],
            [linear.bias for linear in self._linears()],
        )
        self._head = self.tied_head.folded_head()

    def _span(self, dilation: int) -> int:
        """Returns the number of past inputs that a layer reads."""
        return (self.config.kernel_size - 1) * dilation

    def _linears(self) -> list[nn.Linear]:
        return list(self.layers)  # type: ignore[arg-type]
