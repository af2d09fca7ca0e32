"""PARD (2504.18583): a small LM that drafts K tokens in one forward, reading K - 1 mask tokens after the text.

The mask is one token that occurs in no text. A position's distribution depends on the text and on the number of masks
before it, not on the tokens drafted there.

With target features (PARD-2, 2605.08632) the input of a token is its embedding + 0.02 * projection(the target's hidden
layers at the token before), and nothing is added to the first token's. The target has not read what masks stand for:
each is given what is added to the last token before it.

Shape suffixes: B rows, T tokens not yet read, K drafted tokens, N nodes, P length of the longest accepted path, D width
of the draft model, W tokens with logits.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from draftsmith.core import drafter
from draftsmith.core.cache import KVCache
from draftsmith.core.drafter import Session, Step
from draftsmith.core.target import PREFILL_CHUNK, Target
from draftsmith.core.tree import Draft, chain
from draftsmith.length import policies
from draftsmith.loading.precision import KeepsPrecision
from draftsmith.parts import parallel
from draftsmith.parts.checks import MAX_NODES, MAX_WIDTH, check_at_least, check_hidden_layers, check_model
from draftsmith.parts.neural.draft_models import draft_model, listed_logits, listed_tokens, shortlist_of
from draftsmith.parts.neural.layers import gather_path
from draftsmith.parts.neural.shortlist import Shortlist

FEATURE_SCALE = 0.02
"""Factor of the projected hidden layers, as published."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """The draft model's configuration, and the shape of drafts."""

    model: dict[str, Any]
    """The transformers configuration of the draft model, including `model_type`."""
    mask_token: int
    """The token that stands for those to be drafted."""
    features: tuple[int, ...] = ()
    """Hidden layers of the target whose projection is added to the embeddings; empty for none. Of n layers the
    published choice is n - 23, n - 15, n - 7 and n."""
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
        check_hidden_layers(self, "features")
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

    row_state = ("_cache", "_added")
    serving_engines = ("vllm", "sglang", "openvino")
    has_draft_model = True
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
        if max(config.features, default=0) > target.num_layers:
            raise ValueError(
                f"features is {list(config.features)}; {target.name} has hidden layers 0 to {target.num_layers}"
            )
        self.hidden_layers = config.features
        self.model = draft_model(config, target)
        width = self.model.config.get_text_config(decoder=True).hidden_size
        joined_width = target.hidden_size * len(config.features)
        self.projection = nn.Linear(joined_width, width, bias=False) if config.features else None
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

    # Target features, for training and drafting

    def project(self, hidden: dict[int, Tensor]) -> Tensor:
        """Returns what the target's hidden layers at each position add to the token after it [B, T, D]."""
        assert self.projection is not None
        return FEATURE_SCALE * self.projection(torch.cat([hidden[layer] for layer in self.hidden_layers], dim=-1))

    @contextmanager
    def adding(self, added_BTD: Tensor | None) -> Iterator[None]:
        """Adds this to the draft model's embeddings of [B, T] tokens; None adds nothing."""
        if added_BTD is None:
            yield
            return
        hook = self.model.get_input_embeddings().register_forward_hook(lambda module, given, out: out + added_BTD)
        try:
            yield
        finally:
            hook.remove()

    # Drafting

    def start(self, session: Session) -> None:
        self._session = session
        self._cache: KVCache = self.draft_model.new_cache(len(session.rows))
        self._added: list[Tensor] | None = None
        """What is added to each row's tokens that are not read yet, and to the last one that was [T, D]."""
        prompts = [row[:-1] for row in session.rows]
        if self.hidden_layers:
            self._read_with_features(prompts)
        elif max(map(len, prompts)) > 0:
            self.draft_model.prefill(prompts, self._cache)

    def _read_with_features(self, prompts: list[list[int]]) -> None:
        """Feeds and commits the prompts, and keeps what is added to the pending tokens."""
        cache, device, longest = self._cache, self.draft_model.device, max(map(len, prompts))
        width, dtype = self.model.config.get_text_config(decoder=True).hidden_size, self.draft_model.dtype
        nothing_1D = torch.zeros(1, width, device=device, dtype=dtype)
        added = [nothing_1D] * len(prompts)
        if self._session.hidden:
            projected_BTD = self.project(self._session.hidden)
            added = [
                torch.cat([nothing_1D, one_TD[: len(ids)]]) for one_TD, ids in zip(projected_BTD, prompts, strict=True)
            ]
        self._added = [one_TD[-1:] for one_TD in added]
        added_BTD = pad_sequence(added, batch_first=True)
        tokens_BT = torch.tensor([ids + [0] * (longest - len(ids)) for ids in prompts], dtype=torch.long, device=device)
        for begin in range(0, longest, PREFILL_CHUNK):
            part = slice(begin, min(begin + PREFILL_CHUNK, longest))
            with self.adding(added_BTD[:, part]):
                self.draft_model.forward(tokens_BT[:, part], chain(part.stop - begin, device), cache)
            # Shorter rows are padded to the same slots, and cut back below.
            cache.commit([list(range(part.stop - begin)) for _ in prompts])
        cache.lengths = [len(ids) for ids in prompts]

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
        """Keeps what is added to the accepted tokens; they are read with the next masks."""
        if self._added is not None:
            added_BPD = gather_path(self.project(step.hidden), step.verdict)
            self._added = [
                torch.cat([kept_TD, new_PD[: len(path)]])
                for kept_TD, new_PD, path in zip(self._added, added_BPD, step.paths, strict=True)
            ]

    def rewind(self, lengths: list[int]) -> bool:
        """Drops each row's keys and values past its first `lengths` tokens; False with features, which are not kept."""
        if self._added is not None:
            return False
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
        with self.adding(self._added_to(list(map(len, unread)), longest)):
            out = self.draft_model.forward(read_BT, chain(longest, device), cache)
        cache.commit([list(range(len(ids))) for ids in unread])
        last_B1 = torch.tensor([len(ids) - 1 for ids in unread], device=device)[:, None]
        index_BK1 = (last_B1 + torch.arange(depth, device=device))[..., None]
        hidden_BKD = out.hidden_BND.gather(1, index_BK1.expand(-1, -1, out.hidden_BND.shape[-1]))
        return listed_logits(self.draft_model, hidden_BKD, self._vocabulary)

    def _added_to(self, counts: list[int], longest: int) -> Tensor | None:
        """Returns what is added to each row's last `counts` tokens, and to masks up to `longest` [B, T, D]."""
        if self._added is None:
            return None
        read = [one_TD[-count:] for one_TD, count in zip(self._added, counts, strict=True)]
        self._added = [one_TD[-1:] for one_TD in read]
        return torch.stack([torch.cat([one_TD, one_TD[-1:].expand(longest - len(one_TD), -1)]) for one_TD in read])
