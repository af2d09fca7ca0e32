"""EAGLE-3 (2503.01840): a decoder layer on the target's features, then on its own, drafting chains or EAGLE-2's trees.

Position t of the layer holds token t + 1 and the feature of position t, and predicts token t + 2. The features of
committed positions are fused from several hidden layers of the target; those of draft positions are the layer's own
output at the position before.

Shape suffixes: B rows, T positions, N nodes, M new nodes, D hidden width, E widths of the fused layers together,
V vocabulary, W draft vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from draftsmith.core import drafter
from draftsmith.core.cache import KVCache
from draftsmith.core.drafter import Session, Step
from draftsmith.core.target import Target
from draftsmith.core.tree import Draft, Tree
from draftsmith.length import policies
from draftsmith.parts import autoregressive
from draftsmith.parts.checks import (
    MAX_DEPTH,
    MAX_WIDTH,
    check_at_least,
    check_each,
    check_hidden_layers,
    check_positive,
)
from draftsmith.parts.feature_drafting import FeatureState
from draftsmith.parts.neural.layers import Attention, FeedForward, prepare_cache
from draftsmith.parts.neural.shortlist import Shortlist

FUSION_NORMS = ("none", "each", "whole")


@dataclass(frozen=True, kw_only=True)
class Config:
    """The shape of the layer, its inputs and outputs, and the shape of drafts."""

    layers: tuple[int, ...]
    """Hidden layers of the target that are fused into features."""
    num_heads: int
    """Attention heads."""
    num_kv_heads: int
    """Key-value heads, each shared by a group of attention heads."""
    head_width: int
    """Width of a head."""
    inner_width: int
    """Inner width of the MLP."""
    draft_vocab: int = 0
    """Size of the draft vocabulary, 0 for the whole vocabulary."""
    theta: float = 10_000.0
    """Base of the rotary position embedding."""
    stretch: tuple[float, ...] = ()
    """Llama 3.1's RoPE scaling for long texts as (factor, low, high, length), see `layers.rotate`; empty for none."""
    eps: float = 1e-6
    """Epsilon of the norms."""
    fusion_norm: str = field(default="none", metadata={"choices": FUSION_NORMS})
    """Norms before the fusion: none, each layer's own (EAGLE-3.1, 2605.09992), or one over the whole concatenation."""
    norm_output: bool = False
    """Feed the layer its own output after the final norm (EAGLE-3.1)."""
    norm_residual: bool = False
    """Begin the residual stream with the normed feature, as some published heads do."""
    own_embedding: bool = False
    """Embed tokens with weights of its own instead of the target's."""
    num_draft: int = 5
    """Maximum depth of a draft, in tokens."""
    width: int = 4
    """Drafts are dynamic trees: the `width` likeliest nodes per level get `width` children each; 0 drafts chains."""
    num_nodes: int = 16
    """Number of nodes kept in a dynamic tree."""
    length: str = "fixed"
    """Draft-length policy of chains: a name of draftsmith/length/policies.py, and its number."""

    def __post_init__(self) -> None:
        check_hidden_layers(self, "layers", least=1)
        check_at_least(self, 0, "draft_vocab")
        check_at_least(self, 1, "num_heads", "num_kv_heads", most=MAX_DEPTH)
        check_at_least(self, 1, "head_width", "inner_width", most=MAX_WIDTH)
        check_at_least(self, 0, "eps", most=1)
        check_positive(self, "theta", most=1e12)
        check_each(self, 0, "stretch")
        if self.fusion_norm not in FUSION_NORMS:
            raise ValueError(f"fusion_norm is {self.fusion_norm!r}; it must be one of {', '.join(FUSION_NORMS)}")
        if len(self.stretch) not in (0, 4):
            raise ValueError(f"stretch is {list(self.stretch)}; it must be empty, or a factor, two bounds and a length")
        autoregressive.check_shape(self)
        policies.make(self.length)

    @property
    def supports_early_stop(self) -> bool:
        return not self.width


class Drafter(nn.Module, drafter.Drafter):
    """The fusion, the decoder layer with a KV cache of its own, and an LM head over the draft vocabulary."""

    row_state = ("_state",)
    serving_engines = ("vllm", "sglang", "speculators", "llama.cpp", "openvino")
    d2t: Tensor
    """Offset from each draft token's id to the target's id [W]."""
    _shortlist: Shortlist
    t2d: Tensor
    """True for tokens of the draft vocabulary [V]."""

    def __init__(self, config: Config, target: Target) -> None:
        super().__init__()
        if config.layers[-1] > target.num_layers:
            raise ValueError(
                f"layers is {list(config.layers)}; {target.name} has hidden layers 0 to {target.num_layers}"
            )
        vocab_size, width = target.vocab_size, target.hidden_size
        num_tokens = config.draft_vocab or vocab_size
        if not config.width <= num_tokens <= vocab_size:
            raise ValueError(
                f"draft_vocab is {num_tokens}; it must lie between the width, {config.width}, and {vocab_size},"
                " the size of the vocabulary"
            )
        self.config = config
        object.__setattr__(self, "target", target)
        self.hidden_layers = config.layers
        self.joined_width = width * len(config.layers)
        normed = {"none": [], "each": [width] * len(config.layers), "whole": [self.joined_width]}[config.fusion_norm]
        self.fusion_norms = nn.ModuleList(nn.RMSNorm(size, eps=config.eps) for size in normed)
        self.fusion = nn.Linear(self.joined_width, width, bias=False)
        self.token_norm, self.feature_norm = nn.RMSNorm(width, eps=config.eps), nn.RMSNorm(width, eps=config.eps)
        self.attention = Attention(
            width,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_width=config.head_width,
            input_width=2 * width,
            theta=config.theta,
            rope_scaling=config.stretch,
        )
        self.feed_forward_norm = nn.RMSNorm(width, eps=config.eps)
        self.feed_forward = FeedForward(width, config.inner_width)
        self.norm = nn.RMSNorm(width, eps=config.eps)
        self.head = nn.Linear(width, num_tokens, bias=False)
        self.embedding = nn.Embedding(vocab_size, width) if config.own_embedding else None
        self.register_buffer("d2t", torch.zeros(num_tokens, dtype=torch.long))
        self.register_buffer("t2d", torch.arange(vocab_size) < num_tokens)
        self.to(device=target.device, dtype=target.dtype)

    # The network, for training and drafting

    def vocabulary(self) -> Tensor:
        """Returns the target's ids of the draft tokens [W], ascending."""
        return self.d2t + torch.arange(len(self.d2t), device=self.d2t.device)

    def set_vocabulary(self, ids_W: Tensor) -> None:
        """Sets the draft vocabulary to these tokens, in ascending order."""
        assert ids_W.shape == self.d2t.shape and (ids_W.diff() > 0).all()
        self.d2t.copy_(ids_W - torch.arange(len(ids_W), device=ids_W.device))
        self.t2d.zero_()[ids_W] = True

    def join(self, hidden: dict[int, Tensor]) -> Tensor:
        """Returns the concatenation of the layers to be fused [B, T, E]."""
        return torch.cat([hidden[layer] for layer in self.hidden_layers], dim=-1)

    def fuse(self, joined_BTE: Tensor) -> Tensor:
        """Returns the target's features [B, T, D]."""
        if self.fusion_norms:
            parts = joined_BTE.chunk(len(self.fusion_norms), dim=-1)
            joined_BTE = torch.cat([norm(part) for norm, part in zip(self.fusion_norms, parts, strict=True)], dim=-1)
        return self.fusion(joined_BTE)

    def forward(
        self, tokens_BN: Tensor, features_BND: Tensor, attend: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Returns (the features of the predicted tokens, the normed output for the LM head), each [B, N, D].

        With x = [norm(embedding of the tokens); norm(features)]: h = features + attention(x) and
        output = h + feed_forward(norm(h)). `attend` computes the attention over the positions that are visible.
        """
        residual_BND = self.feature_norm(features_BND) if self.config.norm_residual else features_BND
        h_BND = residual_BND + attend(self.attention_input(tokens_BN, features_BND))
        output_BND = h_BND + self.feed_forward(self.feed_forward_norm(h_BND))
        normed_BND = self.norm(output_BND)
        return (normed_BND if self.config.norm_output else output_BND), normed_BND

    def attention_input(self, tokens_BN: Tensor, features_BND: Tensor) -> Tensor:
        """Returns [norm(embedding of the tokens); norm(features)] [B, N, 2 D]."""
        embed = self.embedding if self.embedding is not None else self.target.model.get_input_embeddings()
        return torch.cat([self.token_norm(embed(tokens_BN)), self.feature_norm(features_BND)], dim=-1)

    def logits(self, normed_BND: Tensor) -> Tensor:
        """Returns logits over the target's vocabulary [B, N, V], minus infinity where a token cannot be drafted."""
        logits_BNW = self.head(normed_BND)
        if len(self.d2t) == len(self.t2d):
            return logits_BNW
        undrafted_BNV = logits_BNW.new_full((*logits_BNW.shape[:-1], len(self.t2d)), -torch.inf)
        return undrafted_BNV.index_copy(-1, self.vocabulary(), logits_BNW)

    # Drafting

    def start(self, session: Session) -> None:
        self._session = session
        shortlist = Shortlist(self.config.draft_vocab, len(self.t2d)).to(self.d2t.device)
        if not shortlist.is_whole:
            shortlist.set_tokens(self.vocabulary())
        # Were it a submodule, it would be among the weights.
        object.__setattr__(self, "_shortlist", shortlist)
        self._state = FeatureState(session, self, KVCache(num_layers=1, batch_size=len(session.rows)))

    def propose(self, budget: int) -> Draft:
        if self._state.is_empty:
            return self._session.empty_draft()
        return autoregressive.draft(self._logits, self._session, self.config, budget, self._shortlist)

    def observe(self, step: Step) -> None:
        self._state.observe(step)

    def _logits(self, tokens_BN: Tensor, tree: Tree, first: int) -> Tensor:
        """Returns the logits [B, M, W] of the draft vocabulary after the nodes from `first` on."""
        return self.head(self._state.advance(tokens_BN, tree, first))

    def run(
        self, tokens_BM: Tensor, features_BMD: Tensor, tree: Tree, cache: KVCache, first: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Returns the output of `forward` at the tree's nodes from `first` on, whose keys and values are cached."""
        positions_BM, mask_R1MS = prepare_cache(tree, cache, first=first)
        return self(
            tokens_BM,
            features_BMD,
            lambda x_BME: self.attention(x_BME, positions_BM, mask_R1NS=mask_R1MS, cache=cache),
        )
