"""Causal gated convolutions between the target's embedding and its output matrix, drafting chains or trees.

x = x + (W * x + b) sigmoid(U * x + c) in each layer, over the last `kernel_size` inputs, `dilation` apart (1612.08083,
equation 1; residual as in its section 2). It goes back to any token by the inputs that each layer then looked back on.
For an encoder-decoder target the mean of the source is added to each input, and it looks at the source after each token
(`reading_source`).

Shape suffixes: B rows, T tokens, C channels, K kernel, S inputs that a layer looks back on, G = 2 C.
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
from draftsmith.parts.neural.cross_attention import CrossAttention, ProjectedSource
from draftsmith.parts.neural.recurrent import RecurrentDraftState, State
from draftsmith.parts.neural.shortlist import WeightCache
from draftsmith.parts.neural.tied_heads import TiedHead


@dataclass(frozen=True, kw_only=True)
class Config:
    """The network's shape, and the drafts made with it."""

    num_channels: int = 256
    """Width of its layers."""
    kernel_size: int = 3
    """Inputs that each output of a layer is made of."""
    dilations: tuple[int, ...] = (1, 1, 2, 4)
    """How far apart these lie, layer by layer."""
    rank: int = 256
    """Of the map from features to logits, if the target's output matrix is wider than that."""
    shortlist: int = 0
    """If not 0, logits are of so many tokens only (draftsmith/parts/neural/shortlist.py)."""
    copy: bool = False
    """Whether tokens may be copied from an encoder-decoder target's source, by a law of their own."""
    num_draft: int = 8
    """Most tokens drafted one after the other."""
    length: str = "refit=0.4"
    """How long its chains are: a policy of draftsmith/length/policies.py, and its number."""
    width: int = 0
    """If not 0, trees grow where it is confident: so many nodes a level are given so many children."""
    num_nodes: int = 16
    """Nodes kept of such a tree."""

    def __post_init__(self) -> None:
        for name in ("num_channels", "rank"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.kernel_size < 2:
            raise ValueError(f"kernel_size is {self.kernel_size}; it must be at least 2 to see what came before")
        if not self.dilations or min(self.dilations) < 1:
            raise ValueError(f"dilations are {list(self.dilations)}; name one of at least 1 for each layer")
        if self.copy and self.shortlist:
            raise ValueError("copy and shortlist exclude each other: what is copied need not be on a list")
        autoregressive.check_shape(self)
        policies.make(self.length)

    @property
    def supports_early_stop(self) -> bool:
        return not self.width


class Drafter(nn.Module, drafter.Drafter):
    """The network; its state is, for each layer, the last inputs [B, S, C], zeros where the text had not begun."""

    serving_engines = ("vllm",)

    def __init__(self, config: Config, target: Target) -> None:
        super().__init__()
        self.config = config
        object.__setattr__(self, "target", target)
        size = config.num_channels
        self.ends = TiedHead(target, size, config.rank, shortlist=config.shortlist)
        self.input = nn.Linear(self.ends.input_width, size)
        # Taps side by side, the earliest first.
        self.layers = nn.ModuleList(nn.Linear(config.kernel_size * size, 2 * size) for _ in config.dilations)
        self.reader = CrossAttention(target, size, size, copies=config.copy)
        self.to(device=target.device, dtype=target.dtype)
        self._folded = WeightCache(self, self._fold)

    def forward(self, tokens_BT: Tensor, source: Source | None = None, *, dropout: float = 0.0) -> Tensor:
        """Returns the features [B, T, ...] after each token, which `head` takes.

        In training `dropout` leaves out inputs of layers.
        """
        projected = self.reader.project(source)
        return self.reader.attend(self._run(tokens_BT, projected, dropout)[0], projected)

    def head(self, source: Source | None = None) -> Callable[[Tensor], Tensor]:
        """Returns the map from features after this source [..., X] to logits [..., V]."""
        return self.reader.copy_head(self.ends.head, source)

    # Drafting

    def start(self, session: Session) -> None:
        self._folded()
        self._source = self.reader.project(session.source)
        self._logits = self.reader.copy_head(self._head, session.source)
        self._state = RecurrentDraftState(self, session, self.config)

    def propose(self, budget: int) -> Draft:
        return self._state.propose(budget)

    def observe(self, step: Step) -> None:
        self._state.observe(step)

    def rewind(self, lengths: list[int]) -> bool:
        """Forgets what it read of each row past so many tokens, which were taken back."""
        self._state.rewind(lengths)
        return True

    # RecurrentNetwork

    def read(self, tokens_BT: Tensor, lengths: list[int]) -> State:
        if not any(lengths):
            zeros_C = torch.zeros_like(self.input.bias)
            return tuple(zeros_C.expand(len(lengths), self._span(dilation), -1) for dilation in self.config.dilations)
        lengths_B1 = torch.tensor(lengths, device=tokens_BT.device)[:, None]
        rows_B1 = torch.arange(len(lengths), device=tokens_BT.device)[:, None]
        found = []
        for inputs_BCT in self._run(tokens_BT, self._source)[1]:
            num_back = inputs_BCT.shape[2] - tokens_BT.shape[1]
            places_BS = lengths_B1 + torch.arange(num_back, device=tokens_BT.device)
            found.append(inputs_BCT.transpose(1, 2)[rows_B1, places_BS])
        return tuple(found)

    def step(self, tokens_B: Tensor, state: State) -> tuple[Tensor, State]:
        x_BC, found = self._inputs(tokens_B), []
        if self._source is not None:
            summary_B1C = self._source.summary_BG[:, None]
            x_BC = (x_BC.view(len(summary_B1C), -1, x_BC.shape[1]) + summary_B1C).flatten(0, 1)
        for before_BSC, dilation, weight_KCG, bias_G in zip(state, self.config.dilations, *self._weights, strict=True):
            seen_BSC = torch.cat([before_BSC, x_BC[:, None]], dim=1)
            taps_BKC = seen_BSC[:, ::dilation].flatten(1)
            x_BC = x_BC + functional.glu(torch.addmm(bias_G, taps_BKC, weight_KCG), dim=1)
            found.append(seen_BSC[:, 1:])
        return self.reader.attend(x_BC, self._source), tuple(found)

    def logits(self, features: Tensor) -> Tensor:
        return self._logits(features)

    def _run(
        self, tokens_BT: Tensor, source: ProjectedSource | None, dropout: float = 0.0
    ) -> tuple[Tensor, list[Tensor]]:
        """Returns the features [B, T, C], and each layer's inputs [B, C, S + T], of which the first S are zeros."""
        x_BTC, inputs = self.input(self.ends.embed(tokens_BT)), []
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
        """Lays the weights out for single steps."""
        self._inputs = self.ends.folded_input(self.input.weight, self.input.bias)
        self._weights = (
            [linear.weight.T.contiguous() for linear in self._linears()],
            [linear.bias for linear in self._linears()],
        )
        self._head = self.ends.folded_head()

    def _span(self, dilation: int) -> int:
        """Returns how many inputs a layer looks back on."""
        return (self.config.kernel_size - 1) * dilation

    def _linears(self) -> list[nn.Linear]:
        return list(self.layers)  # type: ignore[arg-type]
