"""A small causal LM with the target's vocabulary, drafting chains (2211.17192; 2302.01318) or trees (`growth`).

Shape suffixes: B rows, N nodes, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from draftsmith import growth, length
from draftsmith.cache import KVCache
from draftsmith.drafters import Session, Step
from draftsmith.sampling import draw
from draftsmith.target import Target
from draftsmith.tree import Draft, Tree, chain

SIBLINGS = ("without_replacement", "independent", "top_and_drawn")


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
    """How siblings in that tree are drawn: without_replacement, independent or top_and_drawn; greedily the best."""
    width: int = 0
    """If not 0, trees grow where the draft model is confident: so many nodes a level are given so many children."""
    num_nodes: int = 16
    """Nodes kept of such a tree."""

    def __post_init__(self) -> None:
        growth.check_paths(self.tree)
        if self.siblings not in SIBLINGS:
            raise ValueError(f"siblings is {self.siblings!r}; there are {', '.join(SIBLINGS)}")
        if self.width < 0 or self.num_nodes < 1:
            raise ValueError(f"width {self.width} must not be negative and num_nodes {self.num_nodes} at least 1")
        if self.width and self.tree:
            raise ValueError("a fixed tree and width, for trees that grow, exclude each other")
        if self.num_draft < 1:
            raise ValueError(f"num_draft is {self.num_draft}; it must be at least 1")
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
        prompts = [row[:-1] for row in session.rows]
        if max(map(len, prompts)) > 0:
            self.engine.prefill(prompts, self._cache)

    def propose(self, budget: int) -> Draft:
        rows, sampling = self._session.rows, self._session.sampling
        device = self.engine.device
        num_draft = min(budget, self.config.num_draft, self.engine.context_length - max(map(len, rows)))
        if num_draft > 0 and (self.config.tree or self.config.width):
            return self._tree(num_draft)
        tokens, laws = [self._session.pending()], []
        num_nodes = [1] * len(rows)
        is_drafting = [True] * len(rows)
        logits_BV = self._catch_up() if num_draft > 0 else None
        for depth in range(1, num_draft + 1):
            assert logits_BV is not None
            if sampling.is_greedy:
                token_B = logits_BV.argmax(-1)
            else:
                laws.append(sampling.law(logits_BV))
                uniforms_B = torch.rand(len(rows), generator=self._session.generator, dtype=torch.float64)
                token_B = draw(laws[-1], uniforms_B.to(device))
            confidences = logits_BV.float().softmax(-1).gather(1, token_B[:, None])[:, 0].tolist()
            tokens.append(token_B)
            for row, is_row_drafting in enumerate(is_drafting):
                num_nodes[row] += is_row_drafting
                is_drafting[row] = is_row_drafting and self._session.goes_on(row, confidences[row])
            if depth == num_draft or not any(is_drafting):
                break
            out = self.engine.forward(token_B[:, None], chain(1, device), self._cache)
            self._cache.commit([[0] for _ in rows])
            logits_BV = self.engine.logits(out.hidden_BND)[:, 0]
        return Draft(
            tokens_BN=torch.stack(tokens, dim=1),
            tree=chain(len(tokens), device),
            num_nodes=num_nodes if len(set(num_nodes)) > 1 or num_nodes[0] < len(tokens) else None,
            draft_probs_BNV=torch.stack(laws, dim=1) if laws else None,
            drawn="independent" if laws else "deterministic",
        )

    def _tree(self, depth: int) -> Draft:
        """Returns a tree; its nodes, the pending ones among them, are fed anew at each level and never kept."""
        config = self.config
        if any(len(row) - length > 1 for row, length in zip(self._session.rows, self._cache.lengths, strict=True)):
            self._feed([row[:-1] for row in self._session.rows])
        if config.width:
            width, num_nodes = config.width, config.num_nodes
            return growth.grow(self._logits, self._session, width=width, num_nodes=num_nodes, depth=depth)
        return growth.fill(self._logits, self._session, config.tree, config.siblings, depth)  # type: ignore[arg-type]

    def _logits(self, tokens_BN: Tensor, tree: Tree) -> Tensor:
        return self.engine.logits(self.engine.forward(tokens_BN, tree, self._cache).hidden_BND)

    def observe(self, step: Step) -> None:
        # What was fed beyond the accepted tokens is overwritten; the last accepted one may not have been fed.
        for row, ids in enumerate(self._session.rows):
            self._cache.lengths[row] = min(self._cache.lengths[row], len(ids) - 1)

    def _catch_up(self) -> Tensor:
        """Feeds each row's committed tokens that the draft model has not read; returns the logits [B, V] after them."""
        hidden_BND, counts = self._feed(self._session.rows)
        last_B = torch.tensor(counts, device=self.engine.device) - 1
        return self.engine.logits(hidden_BND[torch.arange(len(counts), device=last_B.device), last_B][:, None])[:, 0]

    def _feed(self, rows: list[list[int]]) -> tuple[Tensor, list[int]]:
        """Feeds and keeps what is missing of `rows`; returns hidden states [B, N, D] and how many are each row's."""
        missing = [row[length:] for row, length in zip(rows, self._cache.lengths, strict=True)]
        longest, device = max(map(len, missing)), self.engine.device
        tokens_BN = torch.tensor([ids + [0] * (longest - len(ids)) for ids in missing], device=device)
        out = self.engine.forward(tokens_BN, chain(longest, device), self._cache)
        self._cache.commit([list(range(len(ids))) for ids in missing])
        return out.hidden_BND, [len(ids) for ids in missing]
