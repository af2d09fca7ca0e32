"""Parts that drafters with layers of their own are built from: attention with rotary positions, blocks, their caches;
heads for tokens further on, and the static tree that their guesses fill.

The same modules run over whole texts in training and, with a cache, over the nodes of a draft.

Shape suffixes: B rows, N tokens or nodes, M new nodes, P length of the longest accepted path, E width of the input,
D hidden width, V vocabulary, H attention heads, K token heads, S cache slots, R is B or 1.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from draftsmith.core.cache import KVCache, visible
from draftsmith.core.drafter import Session, Step
from draftsmith.core.target import Target
from draftsmith.core.tree import Draft, Tree, Verdict
from draftsmith.parts import growth
from draftsmith.verify.paths import at, pick

Paths = tuple[tuple[int, ...], ...]


def rotate(x_BHND: Tensor, positions_RN: Tensor, theta: float, stretch: tuple[float, ...] = ()) -> Tensor:
    """Turns each half-split pair (x[i], x[i + D/2]) by position * theta^(-2i/D) (RoFormer, 2104.09864).

    With `stretch` = (factor, low, high, length), as of Llama 3.1, pairs that turn less than `low` times in `length`
    positions turn `factor` times slower, those that turn more than `high` times as before, and others in between.
    """
    half = x_BHND.shape[-1] // 2
    powers = torch.arange(half, device=x_BHND.device, dtype=torch.float32) / half
    speeds = theta**-powers
    if stretch:
        factor, low, high, length = stretch
        kept = ((length * speeds / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
        speeds = speeds * (kept + (1 - kept) / factor)
    angles_RND = positions_RN[:, None, :, None].float() * speeds
    cos, sin = angles_RND.cos(), angles_RND.sin()
    first, second = x_BHND.float().split(half, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x_BHND.dtype)


class Attention(nn.Module):
    """Self-attention without biases, rotary positions, keys and values shared by groups of heads."""

    def __init__(
        self,
        width: int,
        *,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_width: int | None = None,
        input_width: int | None = None,
        theta: float = 10_000.0,
        stretch: tuple[float, ...] = (),
    ) -> None:
        super().__init__()
        num_kv_heads = num_kv_heads or num_heads
        head_width = head_width or width // num_heads
        if num_heads % num_kv_heads or head_width % 2:
            raise ValueError(
                f"{num_heads} heads of width {head_width} with {num_kv_heads} of keys: the width must be even, and the"
                " first number a multiple of the last"
            )
        self.num_heads, self.num_kv_heads, self.head_width = num_heads, num_kv_heads, head_width
        self.theta, self.stretch = theta, stretch
        input_width = input_width or width
        self.query = nn.Linear(input_width, num_heads * head_width, bias=False)
        self.key = nn.Linear(input_width, num_kv_heads * head_width, bias=False)
        self.value = nn.Linear(input_width, num_kv_heads * head_width, bias=False)
        self.output = nn.Linear(num_heads * head_width, width, bias=False)

    def forward(
        self,
        x_BNE: Tensor,
        positions_RN: Tensor,
        *,
        mask_R1NS: Tensor | None = None,
        cache: KVCache | None = None,
        layer: int = 0,
    ) -> Tensor:
        """Returns [B, N, D]; causal without a mask. With a cache, new keys and values are written as `layer`'s."""
        query_BHND, key_BHND, value_BHND = self.project(x_BNE, positions_RN)
        if cache is not None:
            key_BHND, value_BHND = cache.update(key_BHND, value_BHND, layer)
        out_BHND = nn.functional.scaled_dot_product_attention(
            query_BHND,
            key_BHND,
            value_BHND,
            attn_mask=mask_R1NS,
            is_causal=mask_R1NS is None,
            enable_gqa=self.num_heads != self.num_kv_heads,
        )
        return self.output(out_BHND.transpose(1, 2).flatten(2))

    def project(self, x_BNE: Tensor, positions_RN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns queries, keys (both rotated) and values, each [B, H, N, D]."""
        query_BHND, key_BHND, value_BHND = (
            part.unflatten(-1, (-1, self.head_width)).transpose(1, 2)
            for part in (self.query(x_BNE), self.key(x_BNE), self.value(x_BNE))
        )
        return (
            rotate(query_BHND, positions_RN, self.theta, self.stretch),
            rotate(key_BHND, positions_RN, self.theta, self.stretch),
            value_BHND,
        )


def ffn_width(width: int) -> int:
    """Returns the usual inner width of a gated feed-forward layer: 8/3 of its own, rounded up to a multiple of 32."""
    return (width * 8 // 3 + 31) // 32 * 32


class FeedForward(nn.Module):
    """down(silu(gate(x)) * up(x)), without biases (SwiGLU, 2002.05202)."""

    def __init__(self, width: int, inner_width: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, inner_width, bias=False)
        self.up = nn.Linear(width, inner_width, bias=False)
        self.down = nn.Linear(inner_width, width, bias=False)

    def forward(self, x_BND: Tensor) -> Tensor:
        return self.down(nn.functional.silu(self.gate(x_BND)) * self.up(x_BND))


class Block(nn.Module):
    """A pre-norm decoder block: x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, width: int, *, num_heads: int, inner_width: int, eps: float = 1e-6, theta: float = 1e4) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(width, eps=eps)
        self.attention = Attention(width, num_heads=num_heads, theta=theta)
        self.feed_forward_norm = nn.RMSNorm(width, eps=eps)
        self.feed_forward = FeedForward(width, inner_width)

    def forward(
        self,
        x_BND: Tensor,
        positions_RN: Tensor,
        *,
        mask_R1NS: Tensor | None = None,
        cache: KVCache | None = None,
        layer: int = 0,
    ) -> Tensor:
        """Returns [B, N, D]; arguments as `Attention.forward`'s."""
        normed_BND = self.attention_norm(x_BND)
        x_BND = x_BND + self.attention(normed_BND, positions_RN, mask_R1NS=mask_R1NS, cache=cache, layer=layer)
        return x_BND + self.feed_forward(self.feed_forward_norm(x_BND))


def place(tree: Tree, cache: KVCache, *, first: int = 0) -> tuple[Tensor, Tensor]:
    """Prepares `cache` for a tree's nodes from `first` on; returns their positions [B, M] and mask [R, 1, M, S]."""
    device = tree.depths_RN.device
    cache.prepare(tree.num_nodes, device, first=first)
    lengths_B1 = torch.tensor(cache.lengths, device=device)[:, None]
    return lengths_B1 + tree.depths_RN[:, first:], visible(tree, cache, first=first)[:, None]


def along(values_BND: Tensor, verdict: Verdict) -> Tensor:
    """Returns what stands at each row's accepted nodes [B, P, D], node 0 first; the last one repeats to fill P."""
    index_BP1 = verdict.path_BP[..., None].expand(-1, -1, values_BND.shape[-1])
    return values_BND.gather(1, index_BP1)


# --- Heads for tokens further on -----------------------------------------------------------------------------------


class Residual(nn.ModuleList):
    """A token head before its output matrix: z = z + SiLU(W z + b) for each block, which start with W and b zero."""

    def __init__(self, width: int, num_blocks: int) -> None:
        super().__init__(nn.Linear(width, width) for _ in range(num_blocks))
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, z_BND: Tensor) -> Tensor:
        for linear in self:
            z_BND = z_BND + nn.functional.silu(linear(z_BND))
        return z_BND


class Together:
    """Residual heads run at once over one position of each row, by copies of their weights as they are now.

    A few small products cost more in calls than in arithmetic.
    """

    def __init__(self, heads: Iterable[nn.Module]) -> None:
        linears = [list(head.children()) for head in heads]
        self._weights = [torch.stack([linear.weight.T for linear in level]) for level in zip(*linears, strict=True)]
        self._biases = [torch.stack([linear.bias for linear in level])[:, None] for level in zip(*linears, strict=True)]

    def __call__(self, z_BD: Tensor, number: int) -> Tensor:
        """Returns what the first `number` heads make of z [B, K, D]."""
        z_KBD = z_BD.expand(number, -1, -1)
        for weight_KDD, bias_K1D in zip(self._weights, self._biases, strict=True):
            z_KBD = z_KBD + nn.functional.silu(torch.baddbmm(bias_K1D[:number], z_KBD, weight_KDD[:number]))
        return z_KBD.transpose(0, 1)


def own_outputs(target: Target, num_heads: int) -> nn.ModuleList:
    """Returns an output matrix for each head, started as a copy of the target's."""
    weight = target.model.get_output_embeddings().weight.detach()
    outputs = nn.ModuleList(nn.Linear(weight.shape[1], weight.shape[0], bias=False) for _ in range(num_heads))
    for output in outputs:
        output.weight = nn.Parameter(weight.clone())
    return outputs


def last_of_prompt(session: Session, layer: int) -> Tensor | None:
    """Returns a hidden layer at each row's last token before the pending one [B, D], None if no row has any.

    A row of one token has none while others do; it is given what stands at the first position.
    """
    if layer not in session.hidden:
        return None
    hidden_BND = session.hidden[layer]
    return at(hidden_BND, torch.tensor([max(len(row) - 2, 0) for row in session.rows], device=hidden_BND.device))


def last_of_path(step: Step, layer: int) -> Tensor:
    """Returns a hidden layer at each row's last accepted node [B, D]."""
    return at(step.hidden[layer], pick(step.verdict.path_BP, step.verdict.num_accepted_B))


def check_tree(paths: Paths, num_heads: int) -> None:
    """Raises ValueError unless these are the nodes of a tree no deeper than there are heads."""
    nodes = {tuple(path) for path in paths}
    if not nodes or len(nodes) != len(paths):
        raise ValueError("tree must list at least one node, and none twice")
    for path in paths:
        if not 1 <= len(path) <= num_heads or min(path) < 0:
            raise ValueError(f"tree node {list(path)} needs 1 to num_heads={num_heads} ranks from 0 up")
        if len(path) > 1 and tuple(path[:-1]) not in nodes:
            raise ValueError(f"tree node {list(path)} has no parent {list(path[:-1])} in the tree")


class StaticTree:
    """A tree whose node (0, 2) is the third guess of head 1 after the first of head 0, cut to any depth."""

    def __init__(self, paths: Paths, target: Target) -> None:
        ordered = sorted((tuple(path) for path in paths), key=lambda path: (len(path), path))
        self.depth = max(map(len, ordered))
        self.num_ranks = 1 + max(map(max, ordered))
        if self.num_ranks > target.vocab_size:
            raise ValueError(
                f"a tree node has rank {self.num_ranks - 1}; the vocabulary of {target.vocab_size} has ranks below"
                f" {target.vocab_size}"
            )
        self._trees = [tree for tree, _ in growth.levels(tuple(ordered), target.device)]
        flat = [(len(path) - 1) * self.num_ranks + path[-1] for path in ordered]
        self._flat_index = torch.tensor(flat, dtype=torch.long, device=target.device)

    def fill(self, pending_B: Tensor, logits_BKV: Tensor) -> Draft:
        """Returns the tree as deep as there are heads in `logits_BKV`, of each head's likeliest tokens."""
        tree = self._trees[logits_BKV.shape[1]]
        guesses_BKR = logits_BKV.topk(self.num_ranks, dim=-1).indices
        drafted_BN = guesses_BKR.flatten(1)[:, self._flat_index[: tree.num_nodes - 1]]
        return Draft(tokens_BN=torch.cat([pending_B[:, None], drafted_BN], dim=1), tree=tree)


class Guesses:
    """One call's drafts by heads on the target's last hidden state, which fill a static tree."""

    def __init__(
        self, session: Session, tree: StaticTree, heads: Iterable[nn.Module], outputs: nn.ModuleList | None
    ) -> None:
        self._session, self._tree, self._outputs = session, tree, outputs
        self._layer = session.target.num_layers
        self._together = Together(heads)
        # Rows of one token have no hidden state yet; if all are such, their first step is a plain one.
        self._last_BD = last_of_prompt(session, self._layer)

    def propose(self, budget: int) -> Draft:
        """Returns the tree, no deeper than `budget`; heads without an output matrix of their own use the target's."""
        if self._last_BD is None:
            return self._session.only_pending()
        target = self._session.target
        features_BKD = self._together(target.norm(self._last_BD), min(budget, self._tree.depth))
        if self._outputs is None:
            logits_BKV = target.head(features_BKD)
        else:
            pairs = zip(self._outputs, features_BKD.unbind(1), strict=False)
            logits_BKV = torch.stack([output(z_BD) for output, z_BD in pairs], dim=1)
        return self._tree.fill(self._session.pending(), logits_BKV)

    def observe(self, step: Step) -> None:
        """Takes in the hidden state at the end of each row's path."""
        self._last_BD = last_of_path(step, self._layer)
