"""Hydra heads (2402.05109): Medusa heads that also read the drafted tokens on the path to theirs.

With a decoder block over the text so far they are Hydra++ (section 4).

Shape suffixes: B rows, T positions, N nodes, M new nodes, I drafted tokens that a head reads, D hidden width, E width
of the embedding, F width of a head's input, V vocabulary, R is B or 1.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from draftsmith.core import drafter
from draftsmith.core.cache import KVCache
from draftsmith.core.drafter import Session, Step
from draftsmith.core.target import PREFILL_CHUNK, Target
from draftsmith.core.tree import Draft, Tree, chain
from draftsmith.parts import autoregressive
from draftsmith.parts.checks import MAX_DEPTH, MAX_WIDTH, check_at_least
from draftsmith.parts.neural.layers import Block, gather_path, prepare_cache
from draftsmith.parts.neural.shortlist import SharedHead, Shortlist
from draftsmith.parts.neural.token_heads import ResidualHead, untied_lm_heads
from draftsmith.verify.paths import values_at


@dataclass(frozen=True, kw_only=True)
class Config:
    """The shape of the heads, their inputs, and the shape of the draft tree."""

    num_heads: int = 4
    """Number of heads; head k (from 0), at the position of token t, predicts token t + 2 + k from those before."""
    num_blocks: int = 1
    """Number of residual blocks per head."""
    own_head: bool = False
    """Give each head an LM head of its own, initialised from the target's, instead of sharing the target's."""
    shortlist: int = 0
    """If not 0, compute logits for this many tokens only (draftsmith/parts/neural/shortlist.py)."""
    prefix_heads: int = 0
    """Attention heads of a decoder block over the hidden states of the text so far; 0 for the last state alone."""
    prefix_width: int = 0
    """Inner width of that block's MLP."""
    tree: tuple[tuple[int, ...], ...] = ((0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (0, 0, 0, 0))
    """Each node as the ranks along its path: (0, 2) is head 1's third choice after head 0's first."""
    siblings: str = field(default="without_replacement", metadata={"choices": autoregressive.SIBLINGS})
    """Sampling scheme of siblings in that tree where text is sampled: without_replacement, independent, top_and_drawn,
    or deterministic for their parent's most likely tokens."""
    width: int = 0
    """If not 0, drafts are dynamic trees: the `width` likeliest nodes per level get `width` children each."""
    num_nodes: int = 16
    """Number of nodes kept in a dynamic tree."""

    def __post_init__(self) -> None:
        check_at_least(self, 1, "num_heads", "num_blocks", most=MAX_DEPTH)
        check_at_least(self, 0, "shortlist")
        if self.shortlist and self.own_head:
            raise ValueError("a shortlist is of the target's LM head, and own_head gives each head one: drop one")
        check_at_least(self, 0, "prefix_heads", most=MAX_DEPTH)
        check_at_least(self, 0, "prefix_width", most=MAX_WIDTH)
        if (self.prefix_heads > 0) != (self.prefix_width > 0) or min(self.prefix_heads, self.prefix_width) < 0:
            raise ValueError(
                f"prefix_heads is {self.prefix_heads} and prefix_width {self.prefix_width}; give both as positive"
                " numbers, or neither"
            )
        autoregressive.check_shape(self)
        autoregressive.check_paths(self.tree)
        autoregressive.check_siblings(self.siblings)
        if bool(self.tree) == bool(self.width):
            raise ValueError("give either a tree, or tree=() and a width for dynamic trees")
        if self.tree and max(map(len, self.tree)) > self.num_heads:
            raise ValueError(f"the tree is {max(map(len, self.tree))} deep, and there are {self.num_heads} heads")

    @property
    def num_draft(self) -> int:
        return self.num_heads


class Head(nn.Module):
    """One head before its LM head: skip(x) + SiLU(W x + b), then residual blocks.

    x is the state and the embedded drafted tokens, concatenated. At initialisation the head returns the state.
    """

    def __init__(self, width: int, input_width: int, num_blocks: int) -> None:
        super().__init__()
        self.skip = nn.Linear(input_width, width)
        self.first = nn.Linear(input_width, width)
        self.rest = ResidualHead(width, num_blocks - 1)
        # The trainer sets its rate.
        self.dropout = nn.Dropout(0.0)
        for parameter in (*self.first.parameters(), self.skip.bias):
            nn.init.zeros_(parameter)
        nn.init.eye_(self.skip.weight)

    def forward(self, x_BMF: Tensor) -> Tensor:
        x_BMF = self.dropout(x_BMF)
        return self.dropout(self.rest(self.skip(x_BMF) + nn.functional.silu(self.first(x_BMF))))


class Drafter(nn.Module, drafter.Drafter):
    """K heads on a state of the text so far and the embeddings of the drafted tokens after it on a path of the tree."""

    row_state = ("_cache", "_state_B1D")

    def __init__(self, config: Config, target: Target) -> None:
        super().__init__()
        self.config = config
        object.__setattr__(self, "target", target)
        self.hidden_layers = (target.num_layers,)
        num_ranks = config.width or 1 + max(map(max, config.tree))
        if num_ranks > target.vocab_size:
            raise ValueError(f"the tree needs {num_ranks} different tokens, and the vocabulary has {target.vocab_size}")
        width = target.hidden_size
        embedding_VE = target.model.get_input_embeddings().weight.detach()
        # Embeddings are often far smaller than hidden states; scaled to their size, heads learn a little faster.
        self._scale = float(embedding_VE.float().square().mean().rsqrt())
        self.heads = nn.ModuleList(
            Head(width, width + (k + 1) * embedding_VE.shape[1], config.num_blocks) for k in range(config.num_heads)
        )
        if config.own_head:
            self.outputs = untied_lm_heads(target, config.num_heads)
        self.shared_head = SharedHead(target, config.shortlist)
        if config.prefix_heads:
            self.prefix = Block(width, num_heads=config.prefix_heads, inner_width=config.prefix_width)
        self.to(device=target.device, dtype=target.dtype)

    def states(self, hidden_BTD: Tensor, cache: KVCache | None = None) -> Tensor:
        """Returns the heads' state of the text [B, T, D] from the target's last hidden states at those positions.

        With a cache the positions follow those that it holds, and nothing is committed.
        """
        normed_BTD = self.target.norm(hidden_BTD)
        if not self.config.prefix_heads:
            return normed_BTD
        length, device = normed_BTD.shape[1], normed_BTD.device
        if cache is None:
            return self.prefix(normed_BTD, torch.arange(length, device=device)[None])
        positions_RT, mask_R1TS = prepare_cache(chain(length, device), cache)
        return self.prefix(normed_BTD, positions_RT, mask_R1NS=mask_R1TS, cache=cache)

    def features(self, state_BMD: Tensor, tokens_BMI: Tensor) -> Tensor:
        """Returns the features [B, M, D] of head I - 1, before its LM head, for the I drafted tokens after a state."""
        embedded_BMIE = self.target.model.get_input_embeddings()(tokens_BMI) * self._scale
        return self.heads[tokens_BMI.shape[-1] - 1](torch.cat([state_BMD, embedded_BMIE.flatten(-2)], dim=-1))

    def head(self, k: int, z_BMD: Tensor) -> Tensor:
        """Returns head k's logits [B, M, V]."""
        return self.outputs[k](z_BMD) if self.config.own_head else self.shared_head(z_BMD)

    @property
    def vocabulary(self) -> Shortlist | None:
        """The tokens that `logits` are of; None if of all."""
        return None if self.config.own_head else self.shared_head.shortlist

    def logits(self, tokens_BN: Tensor, tree: Tree, first: int) -> Tensor:
        """Returns the logits [B, M, W] after the nodes from `first` on, all of depth `tree.depth`."""
        assert self._state_B1D is not None
        path_RMI = paths_to(tree, first)
        rows_B11 = torch.arange(len(tokens_BN), device=tokens_BN.device)[:, None, None]
        state_BMD = self._state_B1D.expand(-1, path_RMI.shape[1], -1)
        z_BMD = self.features(state_BMD, tokens_BN[rows_B11, path_RMI])
        return self.outputs[tree.depth](z_BMD) if self.config.own_head else self.shared_head.listed(z_BMD)

    def start(self, session: Session) -> None:
        self._session = session
        self._cache = KVCache(num_layers=1, batch_size=len(session.rows))
        self._state_B1D: Tensor | None = None
        # Rows of one token have no hidden state yet; if all rows are such, the first step is a plain one.
        if self.hidden_layers[0] in session.hidden:
            self._update_state(session.hidden[self.hidden_layers[0]], [len(row) - 1 for row in session.rows])

    def propose(self, budget: int) -> Draft:
        config = self.config
        if self._state_B1D is None:
            return self._session.empty_draft()
        if config.width:
            return autoregressive.draft(self.logits, self._session, config, budget, self.vocabulary)
        siblings, vocabulary = config.siblings, self.vocabulary
        return autoregressive.draft_static_tree(self.logits, self._session, config.tree, siblings, budget, vocabulary)

    def observe(self, step: Step) -> None:
        counts = [len(path) for path in step.paths]
        accepted_BPD = gather_path(step.hidden[self.hidden_layers[0]], step.verdict)
        self._update_state(accepted_BPD[:, : max(counts)], counts)

    def _update_state(self, hidden_BTD: Tensor, counts: list[int]) -> None:
        """Reads the hidden states of newly committed tokens, `counts` of each row; the last one gives its state."""
        parts, left = [], counts
        for part_BTD in hidden_BTD.split(PREFILL_CHUNK, dim=1):
            parts.append(self.states(part_BTD, self._cache))
            if self.config.prefix_heads:
                self._cache.commit([list(range(min(count, part_BTD.shape[1]))) for count in left])
                left = [max(count - part_BTD.shape[1], 0) for count in left]
        state_BTD = torch.cat(parts, dim=1)
        last_B = torch.tensor([max(count - 1, 0) for count in counts], device=state_BTD.device)
        self._state_B1D = values_at(state_BTD, last_B)[:, None]


def paths_to(tree: Tree, first: int) -> Tensor:
    """Returns the paths [R, M, I] from node 0 to each node from `first` on; these must be the tree's deepest nodes."""
    path = [torch.arange(first, tree.num_nodes, device=tree.parents_RN.device).expand(len(tree.parents_RN), -1)]
    for _ in range(tree.depth):
        path.insert(0, tree.parents_RN.gather(1, path[0]))
    return torch.stack(path, dim=-1)
