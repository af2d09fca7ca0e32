"""EAGLE-3 (2503.01840): one layer that reads the target's features, then its own; chains or EAGLE-2's trees.

Place t of the layer holds token t + 1 and a feature of position t, and says what token t + 2 is. Where the target has
been, the feature is fused from several of its hidden layers; past that it is what the layer itself gave last.

Shape suffixes: B rows, T places not yet read, N nodes, M new nodes, P length of the longest accepted path, D hidden
width, E widths of the fused layers together, V vocabulary, W draft vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from draftsmith.core.cache import KVCache
from draftsmith.core import drafter
from draftsmith.core.drafter import Session, Step
from draftsmith.core.target import PREFILL_CHUNK, Target
from draftsmith.core.tree import Draft, Tree, chain
from draftsmith.length import policies
from draftsmith.parts import growth
from draftsmith.parts.neural.layers import Attention, FeedForward, gather_path, prepare_cache

FUSION_NORMS = ("none", "each", "whole")


@dataclass(frozen=True, kw_only=True)
class Config:
    """The layer's shape, what it reads and says, and the drafts made with it."""

    layers: tuple[int, ...]
    """Hidden layers of the target that are fused."""
    num_heads: int
    """Attention heads."""
    num_kv_heads: int
    """Heads of keys and values, each shared by as many of those."""
    head_width: int
    """Width of a head."""
    inner_width: int
    """Width of the feed-forward layer."""
    draft_vocab: int = 0
    """Tokens that can be drafted, 0 for the whole vocabulary."""
    theta: float = 10_000.0
    """Base of the rotary positions."""
    stretch: tuple[float, ...] = ()
    """How they are slowed for long texts, as `layers.rotate` takes it."""
    eps: float = 1e-6
    """Of the norms."""
    fusion_norm: str = "none"
    """How the layers are normed before: none, each by itself (EAGLE-3.1, 2605.09992), or whole, side by side."""
    norm_output: bool = False
    """Whether the layer is fed its own output normed (EAGLE-3.1)."""
    norm_residual: bool = False
    """Whether the residual stream begins with the normed feature, as in some published heads."""
    own_embedding: bool = False
    """Whether tokens are embedded by weights of its own instead of the target's."""
    num_draft: int = 5
    """Most tokens drafted one after the other."""
    width: int = 4
    """So many nodes a level of a tree are given so many children, where the layer is confident; 0 drafts chains."""
    num_nodes: int = 16
    """Nodes kept of such a tree."""
    length: str = "fixed"
    """How long its chains are: a policy of draftsmith/length/policies.py, and its number."""

    def __post_init__(self) -> None:
        if not self.layers or sorted(set(self.layers)) != list(self.layers) or self.layers[0] < 0:
            raise ValueError(f"layers are {list(self.layers)}; name hidden layers from 0 up in order, none twice")
        if self.fusion_norm not in FUSION_NORMS:
            raise ValueError(f"fusion_norm is {self.fusion_norm!r}; there are {', '.join(FUSION_NORMS)}")
        if len(self.stretch) not in (0, 4):
            raise ValueError(f"stretch is {list(self.stretch)}; it is nothing, or a factor, two bounds and a length")
        growth.check_shape(self)
        policies.make(self.length)

    @property
    def supports_early_stop(self) -> bool:
        return not self.width


class Drafter(nn.Module, drafter.Drafter):
    """The fusion, the layer with a cache of its own, and a head over the draft vocabulary.

    The cache keeps only what comes of the target's features; keys and values of draft nodes are dropped after each
    draft, as what the target then says of the same tokens is better (EAGLE-2, 2406.16858).
    """

    d2t: Tensor
    """What to add to each draft token to get the target's [W]."""
    t2d: Tensor
    """Whether each token can be drafted [V]."""

    def __init__(self, config: Config, target: Target) -> None:
        super().__init__()
        if config.layers[-1] > target.num_layers:
            raise ValueError(f"layers are {list(config.layers)}; {target.name} has {target.num_layers}")
        vocab_size, width = target.vocab_size, target.hidden_size
        num_tokens = config.draft_vocab or vocab_size
        if not config.width <= num_tokens <= vocab_size:
            raise ValueError(f"draft_vocab {num_tokens} must lie between {config.width}, width, and {vocab_size}, all")
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

    # The network, in training as in drafting

    def vocabulary(self) -> Tensor:
        """Returns the target's ids of the draft tokens [W], ascending."""
        return self.d2t + torch.arange(len(self.d2t), device=self.d2t.device)

    def set_vocabulary(self, ids_W: Tensor) -> None:
        """Makes these tokens, in ascending order, those that can be drafted."""
        assert ids_W.shape == self.d2t.shape and (ids_W.diff() > 0).all()
        self.d2t.copy_(ids_W - torch.arange(len(ids_W), device=ids_W.device))
        self.t2d.zero_()[ids_W] = True

    def join(self, hidden: dict[int, Tensor]) -> Tensor:
        """Returns the layers to be fused side by side [B, T, E]."""
        return torch.cat([hidden[layer] for layer in self.hidden_layers], dim=-1)

    def fuse(self, joined_BTE: Tensor) -> Tensor:
        """Returns the features [B, T, D] of the target's positions."""
        if self.fusion_norms:
            parts = joined_BTE.chunk(len(self.fusion_norms), dim=-1)
            joined_BTE = torch.cat([norm(part) for norm, part in zip(self.fusion_norms, parts, strict=True)], dim=-1)
        return self.fusion(joined_BTE)

    def forward(
        self, tokens_BN: Tensor, features_BND: Tensor, attend: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Returns (the features that go with the tokens said, the normed output for the head), each [B, N, D].

        With x = [norm(embedding of the tokens); norm(features)]: h = features + attention(x) and
        output = h + feed_forward(norm(h)). `attend` gives the attention over whatever places these may see.
        """
        embed = self.embedding if self.embedding is not None else self.target.model.get_input_embeddings()
        normed_BND = self.feature_norm(features_BND)
        residual_BND = normed_BND if self.config.norm_residual else features_BND
        h_BND = residual_BND + attend(torch.cat([self.token_norm(embed(tokens_BN)), normed_BND], dim=-1))
        output_BND = h_BND + self.feed_forward(self.feed_forward_norm(h_BND))
        normed_BND = self.norm(output_BND)
        return (normed_BND if self.config.norm_output else output_BND), normed_BND

    def logits(self, normed_BND: Tensor) -> Tensor:
        """Returns logits over the target's vocabulary [B, N, V], minus infinity where a token cannot be drafted."""
        logits_BNW = self.head(normed_BND)
        if len(self.d2t) == len(self.t2d):
            return logits_BNW
        nothing_BNV = logits_BNW.new_full((*logits_BNW.shape[:-1], len(self.t2d)), -torch.inf)
        return nothing_BNV.index_copy(-1, self.vocabulary(), logits_BNW)

    # Drafting

    def start(self, session: Session) -> None:
        self._session = session
        self._cache = KVCache(num_layers=1, batch_size=len(session.rows))
        self._has_read = False
        # What the target made of each row's places past the cached ones [T, E], up to that of the pending token.
        nothing_BTE = torch.zeros(len(session.rows), 0, self.joined_width, device=self.d2t.device)
        joined_BTE = self.join(session.hidden) if session.hidden else nothing_BTE.to(self.target.dtype)
        self._unread = [joined_TE[: len(ids) - 1] for joined_TE, ids in zip(joined_BTE, session.rows, strict=True)]
        if any(map(len, self._unread)):
            self._read()

    def propose(self, budget: int) -> Draft:
        # Rows of one token have no feature; the other rows' drafts need no more than that they have some place.
        if not any(map(len, self._unread)):
            return self._session.only_pending()
        return growth.draft(self._logits, self._session, self.config, budget)

    def observe(self, step: Step) -> None:
        joined_BPE = gather_path(self.join(step.hidden), step.verdict)
        if self._has_read:
            # The last place stands in its slot as node 0: kept where the row has gone on.
            read = [path[:1] if len(unread) else [] for path, unread in zip(step.paths, self._unread, strict=True)]
            self._cache.commit(read)
            self._unread = [unread[len(nodes) :] for unread, nodes in zip(self._unread, read, strict=True)]
            self._has_read = False
        for row, (ids, path) in enumerate(zip(self._session.rows, step.paths, strict=True)):
            unread_TE = torch.cat([self._unread[row], joined_BPE[row, : len(path)]])
            # A row that ended within its path holds less than was accepted.
            self._unread[row] = unread_TE[: len(ids) - 1 - self._cache.lengths[row]]

    def _logits(self, tokens_BN: Tensor, tree: Tree, first: int) -> Tensor:
        if first == 0:
            self._features_BND, normed_BMD = self._read()
            return self.logits(normed_BMD)
        parents_BM1 = tree.parents_RN[:, first:, None].expand(len(tokens_BN), -1, -1)
        above_BMD = self._features_BND.gather(1, parents_BM1.expand(-1, -1, self._features_BND.shape[-1]))
        new_BMD, normed_BMD = self._run(tokens_BN[:, first:], above_BMD, tree, first)
        self._features_BND = torch.cat([self._features_BND[:, :first], new_BMD], dim=1)
        return self.logits(normed_BMD)

    def _read(self) -> tuple[Tensor, Tensor]:
        """Reads each row's unread places; returns what `forward` does at the last, [B, 1, D], which is node 0.

        That one stays unread, and may be read again.
        """
        device, cache = self.d2t.device, self._cache
        counts = [max(len(unread), 1) for unread in self._unread]
        tokens = [torch.tensor(ids[-n:], device=device) for ids, n in zip(self._session.rows, counts, strict=True)]
        tokens_BT = pad_sequence(tokens, batch_first=True)
        features_BTD = self.fuse(pad_sequence(self._unread, batch_first=True))
        starts, found = list(cache.lengths), []
        for begin in range(0, max(counts), PREFILL_CHUNK):
            part = slice(begin, begin + PREFILL_CHUNK)
            num_new = tokens_BT[:, part].shape[1]
            found.append(self._run(tokens_BT[:, part], features_BTD[:, part], chain(num_new, device)))
            # Shorter rows run along at the same places and are cut back below.
            cache.commit([list(range(num_new)) for _ in counts])
        cache.lengths = [start + count - 1 for start, count in zip(starts, counts, strict=True)]
        self._unread = [unread[-1:] for unread in self._unread]
        self._has_read = True
        last_B1 = torch.tensor(counts, device=device)[:, None] - 1
        rows_B1 = torch.arange(len(counts), device=device)[:, None]
        features, normed = (torch.cat(parts, dim=1)[rows_B1, last_B1] for parts in zip(*found, strict=True))
        return features, normed

    def _run(self, tokens_BM: Tensor, features_BMD: Tensor, tree: Tree, first: int = 0) -> tuple[Tensor, Tensor]:
        positions_BM, mask_R1MS = prepare_cache(tree, self._cache, first=first)
        return self(
            tokens_BM,
            features_BMD,
            lambda x_BME: self.attention(x_BME, positions_BM, mask_R1NS=mask_R1MS, cache=self._cache),
        )
