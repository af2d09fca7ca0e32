"""A small LM with the target's vocabulary, drafting chains (2211.17192; 2302.01318) or trees.

For an encoder-decoder target it may be an encoder-decoder too, with its own encoder or with the target's encoder states
(`TargetEncoder`). Those draft chains only.

Shape suffixes: B rows, T tokens not yet read, S positions of the source, D width of the target, N nodes, M new nodes,
V vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from draftsmith.core import drafter
from draftsmith.core.cache import KVCache
from draftsmith.core.drafter import Session, Step
from draftsmith.core.target import Source, Target
from draftsmith.core.tree import Draft, Tree, chain
from draftsmith.length import policies
from draftsmith.loading.precision import KeepsPrecision
from draftsmith.parts import autoregressive
from draftsmith.parts.checks import MAX_WIDTH, check_at_least, check_model
from draftsmith.parts.draft_progress import DraftProgress
from draftsmith.parts.neural import quantised
from draftsmith.parts.neural.draft_models import draft_model, listed_logits, listed_tokens, shortlist_of
from draftsmith.parts.neural.shortlist import OUTSIDE, Shortlist
from draftsmith.verify.paths import values_at


@dataclass(frozen=True, kw_only=True)
class Config:
    """The draft model's configuration, and the shape of drafts."""

    model: dict[str, Any]
    """The transformers configuration of the draft model, including `model_type`."""
    target_encoder: bool = False
    """Use the target's encoder instead of the draft model's own (draftsmith/parts/neural/tied_heads.py)."""
    rank: int = 0
    """If not 0, tie embedding and LM head to the target's, with this rank (draftsmith/parts/neural/tied_heads.py)."""
    shortlist: int = 0
    """If not 0, compute logits for this many tokens only (draftsmith/parts/neural/shortlist.py)."""
    quantised: str = ""
    """Quantisation of its blocks' weights once loaded, if not empty (draftsmith/parts/neural/quantised.py)."""
    num_draft: int = 8
    """Maximum number of tokens drafted per round."""
    length: str = "refit=0.4"
    """Draft-length policy of chains: a name of draftsmith/length/policies.py, and its number."""
    tree: tuple[tuple[int, ...], ...] = ()
    """Each node of a static tree as the ranks along its path, empty for chains: ((0,), (1,), (0, 0), (1, 0)) is two
    paths of two tokens."""
    siblings: str = "without_replacement"
    """Sampling scheme of siblings in that tree: without_replacement, independent or top_and_drawn; the most likely
    tokens if deterministic or greedy."""
    width: int = 0
    """If not 0, drafts are dynamic trees: the `width` likeliest nodes per level get `width` children each."""
    num_nodes: int = 16
    """Number of nodes kept in a dynamic tree."""

    def __post_init__(self) -> None:
        autoregressive.check_paths(self.tree)
        autoregressive.check_siblings(self.siblings)
        autoregressive.check_shape(self)
        check_at_least(self, 0, "rank", most=MAX_WIDTH)
        check_at_least(self, 0, "shortlist")
        check_model(self.model)
        if self.width and self.tree:
            raise ValueError("give either a static tree or a width for dynamic trees, not both")
        policies.make(self.length)
        if self.quantised:
            quantised.check(self.quantised)

    @property
    def supports_early_stop(self) -> bool:
        return not (self.tree or self.width)


class Drafter(KeepsPrecision, drafter.Drafter):
    """The draft model with a KV cache of its own, in which rows advance at different rates."""

    row_state = ("_cache",)
    serving_engines = ("vllm", "sglang", "llama.cpp", "openvino")
    has_draft_model = True
    draft_model: Target

    def __init__(self, config: Config, target: Target) -> None:
        super().__init__()
        self.config = config
        if target.is_encoder_decoder and (config.tree or config.width):
            raise ValueError(f"{target.name} is an encoder-decoder: it verifies chains, not trees")
        self.model = draft_model(config, target, target_encoder=config.target_encoder)
        self.to(device=target.device, dtype=target.dtype).eval()
        object.__setattr__(self, "target", target)
        # `Target` runs the draft model too.
        object.__setattr__(self, "draft_model", Target(self.model))
        if config.tree or config.width:
            self.draft_model.check_trees("so leave out tree and width")
        if not self.shortlist.is_whole:
            self._check_shortlist()

    @property
    def shortlist(self) -> Shortlist:
        """The tokens that it can draft."""
        return shortlist_of(self.model, self.target)

    def read(self, source: Source) -> Source | None:
        """Returns the source as the draft model reads it, cut to its encoder's context; None if it reads none."""
        if not self.draft_model.is_encoder_decoder:
            return None
        if self.config.target_encoder:
            encoded_BSD = source.encoded_BTD.to(self.draft_model.dtype)
            read_BSD = self.model.get_encoder().read(encoded_BSD)
            return Source(tokens_BT=source.tokens_BT, mask_BT=source.mask_BT, encoded_BTD=read_BSD)
        longest = self.draft_model.context_length
        return self.draft_model.encode(source.tokens_BT[:, :longest], source.mask_BT[:, :longest])

    def on_weights_loaded(self) -> None:
        """Quantises the draft model if the configuration says so."""
        if self.config.quantised:
            quantised.quantise(self.model, self.config.quantised)

    def start(self, session: Session) -> None:
        self._session = session
        source = None if session.source is None else self.read(session.source)
        self._cache: KVCache = self.draft_model.new_cache(len(session.rows), source=source)
        self._progress = DraftProgress(session)
        prompts = [row[:-1] for row in session.rows]
        if max(map(len, prompts)) > 0:
            self.draft_model.prefill(prompts, self._cache)

    def change_rows(self, origins: list[int | None], new: Session | None) -> bool:
        # An encoder-decoder's encoded sources are of the rows before.
        return not self.draft_model.is_encoder_decoder and super().change_rows(origins, new)

    @property
    def _vocabulary(self) -> Shortlist | None:
        return listed_tokens(self.draft_model)

    def propose(self, budget: int) -> Draft:
        config, session = self.config, self._session
        budget = min(budget, self.draft_model.context_length - max(map(len, session.rows)))
        if config.tree and budget > 0:
            depth = min(budget, config.num_draft)
            draft = autoregressive.draft_static_tree(
                self._logits, session, config.tree, config.siblings, depth, self._vocabulary
            )
        else:
            draft = autoregressive.draft(self._logits, session, config, budget, self._vocabulary)
        self._progress.drafted(draft, self._progress.num_processed, is_reordered=bool(config.width))
        return draft

    def observe(self, step: Step) -> None:
        self._cache.commit(self._progress.accepted(step, self._cache.lengths))

    def rewind(self, lengths: list[int]) -> bool:
        """Drops each row's keys and values past its first `lengths` tokens; False if it has recurrent layers."""
        if self.draft_model.is_recurrent:
            return False
        self._progress.reset()
        self._cache.lengths = [min(pair) for pair in zip(self._cache.lengths, lengths, strict=True)]
        return True

    @torch.no_grad()
    def _check_shortlist(self) -> None:
        size, model = self.model.get_decoder().config.hidden_size, self.draft_model
        logits_V = model.head(torch.zeros(1, 1, size, device=model.device, dtype=model.dtype))[0, 0]
        if logits_V.max() - logits_V.min() < -OUTSIDE / 10:
            raise ValueError(f"{type(self.model).__name__} scales or caps its logits, so it supports no shortlist")

    def _logits(self, tokens_BN: Tensor, tree: Tree, first: int) -> Tensor:
        """Returns the logits [B, M, W] after the nodes from `first` on."""
        self._progress.num_processed = tree.num_nodes
        if first > 0:
            out = self.draft_model.forward(tokens_BN[:, first:], tree, self._cache, first=first)
            return self._listed(out.hidden_BND)
        # The pending token follows the committed tokens not yet read: none, the last one, or a tree's path.
        unread = [row[length:] for row, length in zip(self._session.rows, self._cache.lengths, strict=True)]
        longest, device = max(map(len, unread)), self.draft_model.device
        unread_BT = torch.tensor([ids + [0] * (longest - len(ids)) for ids in unread], device=device)
        out = self.draft_model.forward(unread_BT, chain(longest, device), self._cache)
        self._cache.commit([list(range(len(ids) - 1)) for ids in unread])
        last_B = torch.tensor([len(ids) - 1 for ids in unread], device=device)
        return self._listed(values_at(out.hidden_BND, last_B)[:, None])

    def _listed(self, hidden_BMD: Tensor) -> Tensor:
        return listed_logits(self.draft_model, hidden_BMD, self._vocabulary)
