"""A small causal LM with the target's vocabulary, drafting chains (2211.17192; 2302.01318).

The draft's length adapts as in transformers' assisted generation: drafting stops after a token whose probability is
below a threshold, which is refit online (Mamou et al. 2405.04304).

Shape suffixes: B rows, N nodes, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from draftsmith.cache import KVCache
from draftsmith.drafters import Session, Step
from draftsmith.sampling import draw
from draftsmith.target import Target
from draftsmith.tree import Draft, chain


@dataclass(frozen=True, kw_only=True)
class Config:
    """The draft model's own configuration, and how long it drafts."""

    model: dict[str, Any]
    """The transformers configuration of the draft model, `model_type` included."""
    num_draft: int = 8
    """Most tokens drafted at a time."""
    confidence: float = 0.4
    """Drafting stops after a token less probable than this; 0 always drafts `num_draft`."""
    adapts: bool = True
    """Whether the threshold is refit to what has been accepted."""

    def __post_init__(self) -> None:
        if self.num_draft < 1:
            raise ValueError(f"num_draft is {self.num_draft}; it must be at least 1")
        if not 0 <= self.confidence < 1:
            raise ValueError(f"confidence is {self.confidence}; it must be at least 0 and below 1")


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
        self._stop = _ConfidenceStop(self.config)

    def propose(self, budget: int) -> Draft:
        rows, sampling = self._session.rows, self._session.sampling
        device = self.engine.device
        num_draft = min(budget, self.config.num_draft, self.engine.context_length - max(map(len, rows)))
        tokens, laws, confidences = [self._session.pending()], [], []
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
            confidence = logits_BV.float().softmax(-1).gather(1, token_B[:, None])[:, 0].tolist()
            tokens.append(token_B)
            confidences.append(confidence)
            for row, is_row_drafting in enumerate(is_drafting):
                num_nodes[row] += is_row_drafting
                is_drafting[row] = is_row_drafting and confidence[row] >= self._stop.threshold
            if depth == num_draft or not any(is_drafting):
                break
            out = self.engine.forward(token_B[:, None], chain(1, device), self._cache)
            self._cache.commit([[0] for _ in rows])
            logits_BV = self.engine.logits(out.hidden_BND)[:, 0]
        self._confidences = confidences
        return Draft(
            tokens_BN=torch.stack(tokens, dim=1),
            tree=chain(len(tokens), device),
            num_nodes=num_nodes if len(set(num_nodes)) > 1 or num_nodes[0] < len(tokens) else None,
            draft_probs_BNV=torch.stack(laws, dim=1) if laws else None,
            drawn="independent" if laws else "deterministic",
        )

    def observe(self, step: Step) -> None:
        for row, (ids, path) in enumerate(zip(self._session.rows, step.paths, strict=True)):
            # What was fed beyond the accepted tokens is overwritten; the last accepted one may not have been fed.
            self._cache.lengths[row] = min(self._cache.lengths[row], len(ids) - 1)
            num_drafted = (step.draft.num_nodes[row] if step.draft.num_nodes else step.draft.tree.num_nodes) - 1
            for depth in range(min(len(path), num_drafted)):
                self._stop.judge(self._confidences[depth][row], matched=depth < len(path) - 1)
        self._stop.refit()

    def _catch_up(self) -> Tensor:
        """Feeds each row's committed tokens that the draft model has not read; returns the logits [B, V] after them."""
        missing = [row[length:] for row, length in zip(self._session.rows, self._cache.lengths, strict=True)]
        longest = max(map(len, missing))
        device = self.engine.device
        tokens_BN = torch.tensor([ids + [0] * (longest - len(ids)) for ids in missing], device=device)
        out = self.engine.forward(tokens_BN, chain(longest, device), self._cache)
        self._cache.commit([list(range(len(ids))) for ids in missing])
        last_B = torch.tensor([len(ids) - 1 for ids in missing], device=device)
        last_B1D = out.hidden_BND[torch.arange(len(missing), device=device), last_B][:, None]
        return self.engine.logits(last_B1D)[:, 0]


class _ConfidenceStop:
    """The threshold below which a drafted token ends the draft, refit to minimise FPR + 3 FNR on recent tokens."""

    MIN_SAMPLES, MAX_SAMPLES, MISS_WEIGHT = 6, 256, 3.0

    def __init__(self, config: Config) -> None:
        self.threshold = config.confidence
        self._adapts = config.adapts and config.confidence > 0
        self._samples: list[tuple[float, bool]] = []

    def judge(self, confidence: float, *, matched: bool) -> None:
        """Notes whether a drafted token of this probability was accepted."""
        self._samples.append((confidence, matched))

    def refit(self) -> None:
        """Sets the threshold between two observed probabilities where the weighted error is least."""
        del self._samples[: -self.MAX_SAMPLES]
        if not self._adapts or len(self._samples) < self.MIN_SAMPLES:
            return
        confidence = np.array([sample[0] for sample in self._samples])
        matched = np.array([sample[1] for sample in self._samples])
        if matched.all() or not matched.any():
            return
        order = confidence.argsort()
        confidence, matched = confidence[order], matched[order]
        # Cutting before entry i stops after the i least probable tokens.
        missed = np.concatenate([[0], matched.cumsum()]) / matched.sum()
        kept_wrong = 1 - np.concatenate([[0], (~matched).cumsum()]) / (~matched).sum()
        cut = int((kept_wrong + self.MISS_WEIGHT * missed).argmin())
        self.threshold = 0.0 if cut == 0 else float(confidence[min(cut, len(confidence) - 1)])
