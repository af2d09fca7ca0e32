"""A small causal LM with the target's vocabulary, drafting chains (2211.17192; 2302.01318) or trees (`growth`).

Shape suffixes: B rows, T tokens not yet read, N nodes, M new nodes, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from draftsmith import growth, length
from draftsmith.cache import KVCache
from draftsmith.drafters import Session, Step
from draftsmith.target import Target
from draftsmith.tree import Draft, Tree, chain
from draftsmith.verify.verdict import at


@dataclass(frozen=True, kw_only=True)
class Config:
    """The draft model's own configuration, and how long it drafts."""

    model: dict[str, Any]
    """The transformers configuration of the draft model, `model_type` included."""
    num_draft: int = 8
    """Most tokens drafted at a time."""
    length: str = "refit=0.4"
    """How long its chains are: a policy of draftsmith/length.py, and its number."""
    tree: tuple[tuple[int, ...], ...] = ()
    """Each node of a fixed tree as the ranks along its path, empty for chains: ((0,), (1,), (0, 0), (1, 0)) is two
    paths of two tokens."""
    siblings: str = "without_replacement"
    """How siblings in that tree are drawn: without_replacement, independent or top_and_drawn; greedily, or if
    deterministic, they are the best."""
    width: int = 0
    """If not 0, trees grow where the draft model is confident: so many nodes a level are given so many children."""
    num_nodes: int = 16
    """Nodes kept of such a tree."""

    def __post_init__(self) -> None:
        growth.check_paths(self.tree)
        growth.check_siblings(self.siblings)
        growth.check_shape(self)
        if self.width and self.tree:
            raise ValueError("a fixed tree and width, for trees that grow, exclude each other")
        length.make(self.length)

    @property
    def asks_length(self) -> bool:
        return not (self.tree or self.width)


class Drafter(nn.Module):
    """The draft model with a cache of its own, whose rows advance as the target's do."""

    target: Target
    engine: Target
    hidden_layers: tuple[int, ...] = ()

    def __init__(self, config: Config, target: Target) -> None:
        super().__init__()
        self.config = config
        settings = {key: value for key, value in config.model.items() if key != "model_type"}
        if "model_type" not in config.model:
            raise ValueError("the draft model's configuration names no model_type")
        if settings.get("vocab_size") != target.vocab_size:
            raise ValueError(
                f"the draft model's vocabulary has {settings.get('vocab_size')} tokens and the target's"
                f" {target.vocab_size}; they must be the same"
            )
        self.model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config.model["model_type"], **settings))
        self.model.to(device=target.device, dtype=target.dtype).eval()
        object.__setattr__(self, "target", target)
        # The loop's own machinery runs the draft model too; a plain attribute would register its weights twice.
        object.__setattr__(self, "engine", Target(self.model))

    def start(self, session: Session) -> None:
        self._session = session
        self._cache: KVCache = self.engine.new_cache(len(session.rows))
        self._draft: Draft | None = None
        self._num_in_place = 0
        prompts = [row[:-1] for row in session.rows]
        if max(map(len, prompts)) > 0:
            self.engine.prefill(prompts, self._cache)

    def propose(self, budget: int) -> Draft:
        config, session = self.config, self._session
        budget = min(budget, self.engine.context_length - max(map(len, session.rows)))
        if config.tree and budget > 0:
            depth = min(budget, config.num_draft)
            draft = growth.fill(self._logits, session, config.tree, config.siblings, depth)  # type: ignore[arg-type]
        else:
            draft = growth.draft(self._logits, session, config, budget)
        self._draft = draft
        # The nodes of a tree that grew have been put in another order.
        self._num_in_place = min(self._num_in_place, 1) if config.width else self._num_in_place
        return draft

    def observe(self, step: Step) -> None:
        # Of another drafter's draft only node 0 is the same.
        in_place = self._num_in_place if step.is_of(self._draft) else min(self._num_in_place, 1)
        self._cache.commit([[node for node in path if node < in_place] for path in step.paths])
        self._num_in_place = 0
        # A row that ended within its path holds less than was accepted.
        for row, ids in enumerate(self._session.rows):
            self._cache.lengths[row] = min(self._cache.lengths[row], len(ids) - 1)

    def rewind(self, lengths: list[int]) -> None:
        """Forgets what it read of each row past so many tokens, which were taken back."""
        self._num_in_place = 0
        self._cache.lengths = [min(pair) for pair in zip(self._cache.lengths, lengths, strict=True)]

    def _logits(self, tokens_BN: Tensor, tree: Tree, first: int) -> Tensor:
        """Returns the logits [B, M, V] after the nodes from `first` on."""
        self._num_in_place = tree.num_nodes
        if first > 0:
            out = self.engine.forward(tokens_BN[:, first:], tree, self._cache, first=first)
            return self.engine.logits(out.hidden_BND)
        # The pending token comes after whatever was committed and not yet read: none, the last one, or a tree's path.
        missing = [row[length:] for row, length in zip(self._session.rows, self._cache.lengths, strict=True)]
        longest, device = max(map(len, missing)), self.engine.device
        missing_BT = torch.tensor([ids + [0] * (longest - len(ids)) for ids in missing], device=device)
        out = self.engine.forward(missing_BT, chain(longest, device), self._cache)
        self._cache.commit([list(range(len(ids) - 1)) for ids in missing])
        last_B = torch.tensor([len(ids) - 1 for ids in missing], device=device)
        return self.engine.logits(at(out.hidden_BND, last_B)[:, None])
