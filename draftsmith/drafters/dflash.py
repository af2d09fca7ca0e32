"""DFlash (2602.06036): drafts a block of tokens in one pass of a few layers that read the target's hidden states.

The block is the pending token and a mask token for each token to be drafted. In every layer its tokens attend to each
other, both ways, and to keys and values projected from the target's fused hidden layers at all earlier positions. The
pending token's own hidden state does not exist yet.

DSpark's two heads are options: a bias on each slot's logits by the token before it, so that slots are no longer drafted
independently of each other, and a confidence, each token's predicted acceptance (DeepSpec; speculators' `dspark`).

Shape suffixes: B rows, T positions, N tokens of a block, K drafted tokens, P length of the longest accepted path,
S cache slots, D hidden width, E widths of the fused layers together, R rank of the bias, V vocabulary, W tokens of the
shortlist.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from draftsmith.core import drafter
from draftsmith.core.cache import KVCache
from draftsmith.core.drafter import Session, Step
from draftsmith.core.target import Target
from draftsmith.core.tree import Draft
from draftsmith.length import policies
from draftsmith.parts import parallel
from draftsmith.parts.checks import (
    MAX_DEPTH,
    MAX_NODES,
    MAX_WIDTH,
    check_at_least,
    check_each,
    check_hidden_layers,
    check_positive,
)
from draftsmith.parts.neural.layers import Attention, FeedForward, gather_path
from draftsmith.parts.neural.shortlist import SharedHead

Attend = Callable[[int, Attention, Tensor], Tensor]
"""(number of the layer, its attention, normed input of the block [B, N, D]) -> output of the attention [B, N, D]."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """The shape of the layers, what they read, and the shape of drafts."""

    layers: tuple[int, ...]
    """Hidden layers of the target that are fused."""
    mask_token: int
    """The token that stands for those to be drafted, embedded by the target; best one that occurs in no text."""
    num_layers: int
    """Number of layers."""
    num_heads: int
    """Attention heads."""
    num_kv_heads: int
    """Key-value heads, each shared by a group of attention heads."""
    head_width: int
    """Width of a head."""
    inner_width: int
    """Inner width of the MLPs."""
    block_size: int = 8
    """Tokens of a block: the pending one and those drafted."""
    shortlist: int = 0
    """If not 0, compute logits for this many tokens only (draftsmith/parts/neural/shortlist.py)."""
    theta: float = 10_000.0
    """Base of the rotary position embedding."""
    stretch: tuple[float, ...] = ()
    """Llama 3.1's RoPE scaling for long texts as (factor, low, high, length), see `layers.rotate`; empty for none."""
    eps: float = 1e-6
    """Epsilon of the norms."""
    num_nodes: int = 0
    """If not 0, drafts are trees of this many nodes, the paths with the largest products of probabilities."""
    length: str = "fixed"
    """Draft-length policy of chains: a name of draftsmith/length/policies.py, and its number."""
    markov_rank: int = 0
    """If not 0, add to each slot's logits a bias of this rank by the token before it (DSpark's Markov head)."""
    confidence: bool = False
    """Predict each drafted token's acceptance (DSpark's confidence head), which length policies then go by in place of
    the token's probability."""

    def __post_init__(self) -> None:
        check_hidden_layers(self, "layers", least=1)
        check_at_least(self, 0, "mask_token", "shortlist")
        check_at_least(self, 0, "markov_rank", most=MAX_WIDTH)
        check_at_least(self, 1, "num_layers", "num_heads", "num_kv_heads", most=MAX_DEPTH)
        check_at_least(self, 1, "head_width", "inner_width", most=MAX_WIDTH)
        check_at_least(self, 2, "block_size", most=MAX_NODES)
        check_at_least(self, 0, "eps", most=1)
        check_positive(self, "theta", most=1e12)
        check_each(self, 0, "stretch")
        if len(self.stretch) not in (0, 4):
            raise ValueError(f"stretch is {list(self.stretch)}; it must be empty, or a factor, two bounds and a length")
        parallel.check_shape(self)
        policies.make(self.length)
        if self.confidence and self.num_nodes:
            raise ValueError(
                f"confidence is set and num_nodes is {self.num_nodes}: only the lengths of chains are controlled; leave"
                " one of them out"
            )

    @property
    def num_draft(self) -> int:
        """Maximum number of tokens drafted per round."""
        return self.block_size - 1

    @property
    def supports_early_stop(self) -> bool:
        return not self.num_nodes


class Layer(nn.Module):
    """A pre-norm decoder layer: x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: Config, width: int) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(width, eps=config.eps)
        self.attention = Attention(
            width,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_width=config.head_width,
            theta=config.theta,
            rope_scaling=config.stretch,
            head_norm_eps=config.eps,
        )
        self.feed_forward_norm = nn.RMSNorm(width, eps=config.eps)
        self.feed_forward = FeedForward(width, config.inner_width)


class MarkovHead(nn.Module):
    """DSpark's bias on the logits that follow a token: row `token` of W1 [V, R], times W2 [W, R], transposed.

    W2 is zero at first, so that an untrained head changes nothing.
    """

    def __init__(self, vocab_size: int, num_listed: int, rank: int) -> None:
        super().__init__()
        self.previous = nn.Embedding(vocab_size, rank)
        self.next = nn.Linear(rank, num_listed, bias=False)
        nn.init.zeros_(self.next.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        """Returns the biases [..., W] after tokens [...]."""
        return self.next(self.previous(tokens))


class Drafter(nn.Module, drafter.Drafter):
    """The fusion and the layers, between the target's embedding and its LM head, both frozen.

    The cache keeps the keys and values of the target's hidden states alone; those of a block are overwritten.
    """

    row_state = ("_cache",)
    serving_engines = ("vllm", "sglang", "speculators", "llama.cpp", "openvino")
    step_salt: str = ""
    """What a training step draws its blocks by, beside the rows' keys (trainers/dflash.py)."""
    reads_text: bool = False
    """True in training steps without hidden states of the target (trainers/dflash.py)."""

    def __init__(self, config: Config, target: Target) -> None:
        super().__init__()
        if target.is_encoder_decoder:
            raise ValueError(f"target {target.name} is an encoder-decoder; DFlash needs a causal target")
        if config.layers[-1] > target.num_layers:
            raise ValueError(
                f"layers is {list(config.layers)}; {target.name} has hidden layers 0 to {target.num_layers}"
            )
        if config.mask_token >= target.vocab_size:
            raise ValueError(
                f"mask_token is {config.mask_token}; {target.name} has {target.vocab_size} tokens, so it must be less"
            )
        self.config = config
        object.__setattr__(self, "target", target)
        self.hidden_layers = config.layers
        width = target.hidden_size
        self.joined_width = width * len(config.layers)
        self.fusion = nn.Linear(self.joined_width, width, bias=False)
        self.fusion_norm = nn.RMSNorm(width, eps=config.eps)
        self.layers = nn.ModuleList(Layer(config, width) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(width, eps=config.eps)
        self.shared_head = SharedHead(target, config.shortlist)
        rank = config.markov_rank
        self.markov = MarkovHead(target.vocab_size, len(self.shared_head.shortlist), rank) if rank else None
        self.confidence = nn.Linear(width + rank, 1) if config.confidence else None
        self.to(device=target.device, dtype=target.dtype)

    # The network, for training and drafting

    def join(self, hidden: dict[int, Tensor]) -> Tensor:
        """Returns the concatenation of the layers to be fused [B, T, E]."""
        return torch.cat([hidden[layer] for layer in self.hidden_layers], dim=-1)

    def fuse(self, joined_BTE: Tensor) -> Tensor:
        """Returns the states that keys and values are projected from [B, T, D]."""
        return self.fusion_norm(self.fusion(joined_BTE))

    def forward(self, tokens_BN: Tensor, attend: Attend) -> Tensor:
        """Returns the normed output [B, N, D] for blocks of tokens; `attend` computes each layer's attention."""
        x_BND = self.target.model.get_input_embeddings()(tokens_BN).detach()
        for number, layer in enumerate(self.layers):
            assert isinstance(layer, Layer)
            x_BND = x_BND + attend(number, layer.attention, layer.attention_norm(x_BND))
            x_BND = x_BND + layer.feed_forward(layer.feed_forward_norm(x_BND))
        return self.norm(x_BND)

    def logits(self, z_KD: Tensor, previous_K: Tensor) -> Tensor:
        """Returns the shortlist's logits [..., W] at slots with outputs [..., D], given the token before each [...]."""
        logits_KW = self.shared_head.listed(z_KD)
        return logits_KW if self.markov is None else logits_KW + self.markov(previous_K)

    def confidence_logits(self, z_KD: Tensor, previous_K: Tensor) -> Tensor:
        """Returns the logits of the predicted acceptance [...] at the slots that `logits` takes.

        They have no gradient but the head's own, so that drafts are those of a drafter without confidence.
        """
        assert self.confidence is not None
        features = z_KD if self.markov is None else torch.cat([z_KD, self.markov.previous(previous_K)], dim=-1)
        return self.confidence(features.detach())[..., 0]

    # Drafting

    def start(self, session: Session) -> None:
        self._session = session
        self._cache = KVCache(num_layers=self.config.num_layers, batch_size=len(session.rows))
        if session.hidden:
            self._read(self.join(session.hidden), [len(row) - 1 for row in session.rows])

    def propose(self, budget: int) -> Draft:
        depth = min(budget, self.config.num_draft)
        if depth < 1:
            return self._session.empty_draft()
        pending_B, cache, block_size = self._session.pending(), self._cache, self.config.block_size
        tokens_BN = functional.pad(pending_B[:, None], (0, block_size - 1), value=self.config.mask_token)
        # The whole block is run even if less is drafted, because its tokens attend to those after them.
        cache.prepare(block_size, pending_B.device)
        ends_B1 = torch.tensor(cache.lengths, device=pending_B.device)[:, None] + block_size
        positions_BN = ends_B1 - block_size + torch.arange(block_size, device=pending_B.device)
        order_S = torch.arange(cache.num_visible, device=pending_B.device)
        mask_B11S = (order_S < ends_B1)[:, None, None] if cache.is_ragged else None

        def attend(number: int, attention: Attention, x_BND: Tensor) -> Tensor:
            query_BHND, key_BHND, value_BHND = attention.project(x_BND, positions_BN)
            key_BHSD, value_BHSD = cache.update(key_BHND, value_BHND, number)
            return attention.output(attended(query_BHND, key_BHSD, value_BHSD, mask_B11S))

        z_BKD = self(tokens_BN, attend)[:, 1 : depth + 1]
        logits_BKW, session = self.shared_head.listed(z_BKD), self._session
        bias: parallel.Bias | None = self.markov
        if self.confidence is not None:
            session, bias = self._with_confidence(z_BKD)
        return parallel.draft(logits_BKW, session, self.config, self.shared_head.shortlist, bias)

    def _with_confidence(self, z_BKD: Tensor) -> tuple[Session, parallel.Bias | None]:
        """Returns the session in which policies see predicted acceptances, and the bias, which computes them with it.

        A token's predicted acceptance depends on the tokens before it alone, so the draft's length depends on nothing
        that a policy may not use.
        """
        session, markov = self._session, self.markov
        predicted_KB: list[list[float]] = []
        num_asked = [0] * len(session.rows)
        if markov is None:
            # Without the bias, a slot's confidence does not read the token before it.
            predicted_BK = self.confidence_logits(z_BKD, session.pending()[:, None].expand(z_BKD.shape[:2])).sigmoid()
            predicted_KB = predicted_BK.T.tolist()

        def bias(tokens_BN: Tensor) -> Tensor:
            assert markov is not None
            z_BD, previous_B = z_BKD[:, len(predicted_KB)], tokens_BN[:, -1]
            predicted_KB.append(self.confidence_logits(z_BD, previous_B).sigmoid().tolist())
            return markov(tokens_BN)

        def should_continue(row: int, probability: float) -> bool:
            num_asked[row] += 1
            return session.should_continue(row, predicted_KB[num_asked[row] - 1][row])

        return dataclasses.replace(session, should_continue=should_continue), None if markov is None else bias

    def observe(self, step: Step) -> None:
        joined_BPE = gather_path(self.join(step.hidden), step.verdict)
        # A row that finished within its path has fewer tokens than were accepted.
        missing = [len(ids) - 1 - held for ids, held in zip(self._session.rows, self._cache.lengths, strict=True)]
        self._read(joined_BPE, [min(len(path), most) for path, most in zip(step.paths, missing, strict=True)])

    def _read(self, joined_BTE: Tensor, counts: list[int]) -> None:
        """Appends the keys and values of the first `counts` of each row's new positions to the cache."""
        cache, num_new, device = self._cache, joined_BTE.shape[1], joined_BTE.device
        cache.prepare(num_new, device)
        positions_BT = torch.tensor(cache.lengths, device=device)[:, None] + torch.arange(num_new, device=device)
        states_BTD = self.fuse(joined_BTE)
        for number, layer in enumerate(self.layers):
            assert isinstance(layer, Layer)
            cache.update(*layer.attention.keys_and_values(states_BTD, positions_BT), number)
        cache.commit([list(range(count)) for count in counts])


def attended(query_BHND: Tensor, key_BHSD: Tensor, value_BHSD: Tensor, mask_BHNS: Tensor | None) -> Tensor:
    """Returns the heads' outputs joined [B, N, H * D]; fewer key heads are shared by groups of query heads."""
    out_BHND = functional.scaled_dot_product_attention(
        query_BHND, key_BHSD, value_BHSD, attn_mask=mask_BHNS, enable_gqa=query_BHND.shape[1] != key_BHSD.shape[1]
    )
    return out_BHND.transpose(1, 2).flatten(2)
