"""Hydra's heads (2402.05109): Medusa's, each told the tokens before the one that it guesses, so that a tree's paths
part ways; with a block of attention over the text so far, Hydra++ (section 4).

Shape suffixes: B rows, T positions, N nodes, M new nodes, I tokens told to a head, D hidden width, E width of the
embedding, F width of a head's input, V vocabulary, R is B or 1.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from draftsmith.core.cache import KVCache
from draftsmith.core import drafter
from draftsmith.core.drafter import Session, Step
from draftsmith.core.target import PREFILL_CHUNK, Target
from draftsmith.core.tree import Draft, Tree, chain
from draftsmith.parts import growth
from draftsmith.parts.neural import layers, token_heads
from draftsmith.verify.paths import at


@dataclass(frozen=True, kw_only=True)
class Config:
    """The heads' shape, what they read, and the tree they fill."""

    num_heads: int = 4
    """Head k (from 0), at the position of token t, predicts token t + 2 + k from tokens t + 1 to t + 1 + k."""
    num_blocks: int = 1
    """Residual blocks a head, each with weights of its own."""
    own_head: bool = False
    """Whether each head has its own output matrix, started as a copy of the target's, or uses the target's head."""
    prefix_heads: int = 0
    """Attention heads of a block that reads the hidden states of the whole text; 0 for none, the last state alone."""
    prefix_width: int = 0
    """Inner width of that block's feed-forward layer."""
    tree: tuple[tuple[int, ...], ...] = ((0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (0, 0, 0, 0))
    """Each node as the ranks along its path: (0, 2) is the third guess of head 1 after the first guess of head 0."""
    siblings: str = "without_replacement"
    """How siblings in that tree are drawn where text is sampled: without_replacement, independent, top_and_drawn or
    deterministic, as their parent's likeliest tokens."""
    width: int = 0
    """If not 0, in place of `tree`, trees grow where the heads are confident: so many nodes a level are given so many
    children."""
    num_nodes: int = 16
    """Nodes kept of such a tree."""

    def __post_init__(self) -> None:
        for name in ("num_heads", "num_blocks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if (self.prefix_heads > 0) != (self.prefix_width > 0) or min(self.prefix_heads, self.prefix_width) < 0:
            raise ValueError(f"prefix_heads {self.prefix_heads} and prefix_width {self.prefix_width} go together")
        growth.check_shape(self)
        growth.check_paths(self.tree)
        growth.check_siblings(self.siblings)
        if bool(self.tree) == bool(self.width):
            raise ValueError("give either a tree or a width for trees that grow, and tree=() for the latter")
        if self.tree and max(map(len, self.tree)) > self.num_heads:
            raise ValueError(f"the tree is {max(map(len, self.tree))} deep, and there are {self.num_heads} heads")

    @property
    def num_draft(self) -> int:
        return self.num_heads


class Head(nn.Module):
    """One head before its output matrix: skip(x) + SiLU(W x + b), then residual blocks.

    x is the state and the tokens told, side by side. A new head passes the state through.
    """

    def __init__(self, width: int, input_width: int, num_blocks: int) -> None:
        super().__init__()
        self.skip = nn.Linear(input_width, width)
        self.first = nn.Linear(input_width, width)
        self.rest = token_heads.ResidualHead(width, num_blocks - 1)
        # Its rate is the trainer's affair.
        self.dropout = nn.Dropout(0.0)
        for parameter in (*self.first.parameters(), self.skip.bias):
            nn.init.zeros_(parameter)
        nn.init.eye_(self.skip.weight)

    def forward(self, x_BMF: Tensor) -> Tensor:
        x_BMF = self.dropout(x_BMF)
        return self.dropout(self.rest(self.skip(x_BMF) + nn.functional.silu(self.first(x_BMF))))


class Drafter(nn.Module, drafter.Drafter):
    """K heads on a state of the text so far, and the embeddings of the tokens after it on a path of the tree."""


    def __init__(self, config: Config, target: Target) -> None:
        super().__init__()
        self.config = config
        object.__setattr__(self, "target", target)
        self.hidden_layers = (target.num_layers,)
        num_ranks = config.width or 1 + max(map(max, config.tree))
        if num_ranks > target.vocab_size:
            raise ValueError(f"the tree asks for {num_ranks} different tokens of a vocabulary of {target.vocab_size}")
        width = target.hidden_size
        embedding_VE = target.model.get_input_embeddings().weight.detach()
        # Embeddings are often far smaller than hidden states; brought to their size, heads learn a little sooner.
        self._scale = float(embedding_VE.float().square().mean().rsqrt())
        self.heads = nn.ModuleList(
            Head(width, width + (k + 1) * embedding_VE.shape[1], config.num_blocks) for k in range(config.num_heads)
        )
        if config.own_head:
            self.outputs = token_heads.untied_lm_heads(target, config.num_heads)
        if config.prefix_heads:
            self.prefix = layers.Block(width, num_heads=config.prefix_heads, inner_width=config.prefix_width)
        self.to(device=target.device, dtype=target.dtype)

    def states(self, hidden_BTD: Tensor, cache: KVCache | None = None) -> Tensor:
        """Returns what heads know of the text [B, T, D], from the target's last hidden states at those positions.

        With a cache they come after the positions that it holds, and nothing is committed.
        """
        normed_BTD = self.target.norm(hidden_BTD)
        if not self.config.prefix_heads:
            return normed_BTD
        length, device = normed_BTD.shape[1], normed_BTD.device
        if cache is None:
            return self.prefix(normed_BTD, torch.arange(length, device=device)[None])
        positions_RT, mask_R1TS = layers.prepare_cache(chain(length, device), cache)
        return self.prefix(normed_BTD, positions_RT, mask_R1NS=mask_R1TS, cache=cache)

    def features(self, state_BMD: Tensor, tokens_BMI: Tensor) -> Tensor:
        """Returns head I - 1's features [B, M, D], before the output matrix, after these tokens that follow a state."""
        embedded_BMIE = self.target.model.get_input_embeddings()(tokens_BMI) * self._scale
        return self.heads[tokens_BMI.shape[-1] - 1](torch.cat([state_BMD, embedded_BMIE.flatten(-2)], dim=-1))

    def head(self, k: int, z_BMD: Tensor) -> Tensor:
        """Returns head k's logits [B, M, V]."""
        return self.outputs[k](z_BMD) if self.config.own_head else self.target.head(z_BMD)

    def logits(self, tokens_BN: Tensor, tree: Tree, first: int) -> Tensor:
        """Returns the logits [B, M, V] after the nodes from `first` on, all of them `tree.depth` deep."""
        assert self._state_B1D is not None
        path_RMI = paths_to(tree, first)
        rows_B11 = torch.arange(len(tokens_BN), device=tokens_BN.device)[:, None, None]
        state_BMD = self._state_B1D.expand(-1, path_RMI.shape[1], -1)
        return self.head(tree.depth, self.features(state_BMD, tokens_BN[rows_B11, path_RMI]))

    def start(self, session: Session) -> None:
        self._session = session
        self._cache = KVCache(num_layers=1, batch_size=len(session.rows))
        self._state_B1D: Tensor | None = None
        # Rows of one token have no hidden state yet; if all are such, their first step is a plain one.
        if self.hidden_layers[0] in session.hidden:
            self._advance(session.hidden[self.hidden_layers[0]], [len(row) - 1 for row in session.rows])

    def propose(self, budget: int) -> Draft:
        config = self.config
        if self._state_B1D is None:
            return self._session.only_pending()
        if config.width:
            return growth.draft(self.logits, self._session, config, budget)
        siblings = config.siblings
        return growth.fill(self.logits, self._session, config.tree, siblings, budget)  # type: ignore[arg-type]

    def observe(self, step: Step) -> None:
        counts = [len(path) for path in step.paths]
        accepted_BPD = layers.gather_path(step.hidden[self.hidden_layers[0]], step.verdict)
        self._advance(accepted_BPD[:, : max(counts)], counts)

    def _advance(self, hidden_BTD: Tensor, counts: list[int]) -> None:
        """Takes in the hidden states of newly committed tokens, so many of each row; the last gives its state."""
        parts, left = [], counts
        for part_BTD in hidden_BTD.split(PREFILL_CHUNK, dim=1):
            parts.append(self.states(part_BTD, self._cache))
            if self.config.prefix_heads:
                self._cache.commit([list(range(min(count, part_BTD.shape[1]))) for count in left])
                left = [max(count - part_BTD.shape[1], 0) for count in left]
        state_BTD = torch.cat(parts, dim=1)
        last_B = torch.tensor([max(count - 1, 0) for count in counts], device=state_BTD.device)
        self._state_B1D = at(state_BTD, last_B)[:, None]


def paths_to(tree: Tree, first: int) -> Tensor:
    """Returns the nodes from node 0 to each of those from `first` on [R, M, I], which must be the tree's deepest."""
    climb = [torch.arange(first, tree.num_nodes, device=tree.parents_RN.device).expand(len(tree.parents_RN), -1)]
    for _ in range(tree.depth):
        climb.insert(0, tree.parents_RN.gather(1, climb[0]))
    return torch.stack(climb, dim=-1)
