"""PARD (2504.18583): a small LM that drafts K tokens in one forward, reading K - 1 mask tokens after the text.

The mask is one token that occurs in no text. A position's distribution depends on the text and on the number of masks
before it, not on the tokens drafted there.

Shape suffixes: B rows, T tokens not yet read, K drafted tokens, D width of the draft model,
W tokens with logits.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from draftsmith.core import drafter
from draftsmith.core.cache import KVCache
from draftsmith.core.drafter import Session, Step
from draftsmith.core.target import Target
from draftsmith.core.tree import Draft, chain
from draftsmith.length import policies
from draftsmith.loading.precision import KeepsPrecision
from draftsmith.parts import parallel
from draftsmith.parts.checks import MAX_NODES, MAX_WIDTH, check_at_least, check_model
from draftsmith.parts.neural.draft_models import draft_model, listed_logits, listed_tokens, shortlist_of
from draftsmith.parts.neural.shortlist import Shortlist


@dataclass(frozen=True, kw_only=True)
class Config:
    """The draft model's configuration, and the shape of drafts."""

    model: dict[str, Any]
    """The transformers configuration of the draft model, including `model_type`."""
    mask_token: int
    """The token that stands for those to be drafted."""
    rank: int = 0
    """If not 0, tie embedding and LM head to the target's, with this rank (draftsmith/parts/neural/tied_heads.py)."""
    shortlist: int = 0
    """If not 0, compute logits for this many tokens only (draftsmith/parts/neural/shortlist.py)."""
    num_draft: int = 8
    """Maximum number of tokens drafted per round."""
    num_nodes: int = 0
    """If not 0, drafts are trees of this many nodes, the paths with the largest products of probabilities."""
    length: str = "fixed"
    """Draft-length policy of chains: a name of draftsmith/length/policies.py, and its number."""

    def __post_init__(self) -> None:
        check_at_least(self, 0, "mask_token", "shortlist")
        check_at_least(self, 0, "rank", most=MAX_WIDTH)
        check_at_least(self, 1, "num_draft", most=MAX_NODES)
        check_model(self.model)
        parallel.check_shape(self)
        policies.make(self.length)

    @property
    def supports_early_stop(self) -> bool:
        return not self.num_nodes


class Drafter(KeepsPrecision, drafter.Drafter):
    """The draft model with a KV cache of its own, which keeps the text's keys and values and none of masks."""

    row_state = ("_cache",)
    serving_engines = ("vllm", "sglang", "openvino")
    draft_model: Target
    step_salt: str = ""
    """What a training step draws its masks by, beside the rows' keys (trainers/pard.py)."""

    def __init__(self, config: Config, target: Target) -> None:
        super().__init__()
        self.config = config
        if target.is_encoder_decoder:
            raise ValueError(f"target {target.name} is an encoder-decoder; PARD needs a causal target")
        if config.mask_token >= target.vocab_size:
            raise ValueError(
                f"mask_token is {config.mask_token}; {target.name} has {target.vocab_size} tokens, so it must be less"
            )
        self.model = draft_model(config, target)
        self.to(device=target.device, dtype=target.dtype).eval()
        object.__setattr__(self, "target", target)
        # `Target` runs the draft model too.
        object.__setattr__(self, "draft_model", Target(self.model))
        if self.draft_model.is_recurrent:
            raise ValueError(f"{type(self.model).__name__} has recurrent layers; PARD needs a model of attention alone")

    @property
    def shortlist(self) -> Shortlist:
        """The tokens that it can draft."""
        return shortlist_of(self.model, self.target)

    def start(self, session: Session) -> None:
        self._session = session
        self._cache: KVCache = self.draft_model.new_cache(len(session.rows))
        prompts = [row[:-1] for row in session.rows]
        if max(map(len, prompts)) > 0:
            self.draft_model.prefill(prompts, self._cache)

    @property
    def _vocabulary(self) -> Shortlist | None:
        return listed_tokens(self.draft_model)

    def propose(self, budget: int) -> Draft:
        session = self._session
        budget = min(budget, self.draft_model.context_length - max(map(len, session.rows)))
        depth = min(budget, self.config.num_draft)
        if depth < 1:
            return session.empty_draft()
        return parallel.draft(self._logits(depth), session, self.config, self._vocabulary)

    def observe(self, step: Step) -> None:
        pass  # accepted tokens are read with the next masks

    def rewind(self, lengths: list[int]) -> bool:
        """Drops each row's keys and values past its first `lengths` tokens."""
        self._cache.lengths = [min(pair) for pair in zip(self._cache.lengths, lengths, strict=True)]
        return True

    def _logits(self, depth: int) -> Tensor:
        """Returns the logits [B, K, W] after the pending tokens and after each of K - 1 masks."""
        rows, cache, device = self._session.rows, self._cache, self.draft_model.device
        # The pending token is read again if a draft of it was not followed by another token.
        cache.lengths = [min(length, len(row) - 1) for length, row in zip(cache.lengths, rows, strict=True)]
        unread = [row[length:] for row, length in zip(rows, cache.lengths, strict=True)]
        longest = max(map(len, unread)) + depth - 1
        mask = self.config.mask_token
        read_BT = torch.tensor([ids + [mask] * (longest - len(ids)) for ids in unread], device=device)
        out = self.draft_model.forward(read_BT, chain(longest, device), cache)
        cache.commit([list(range(len(ids))) for ids in unread])
        last_B1 = torch.tensor([len(ids) - 1 for ids in unread], device=device)[:, None]
        index_BK1 = (last_B1 + torch.arange(depth, device=device))[..., None]
        hidden_BKD = out.hidden_BND.gather(1, index_BK1.expand(-1, -1, out.hidden_BND.shape[-1]))
        return listed_logits(self.draft_model, hidden_BKD, self._vocabulary)
