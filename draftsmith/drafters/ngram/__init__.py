"""Drafts chains from a Kneser-Ney n-gram model of target-generated text, interpolated with a cache of the row's text.

Shape suffixes: B rows, G rows still drafting, N nodes, V vocabulary, S tokens that followed in a text, X positions.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor

from draftsmith.core import drafter
from draftsmith.core.drafter import Session, Step
from draftsmith.core.sampling import Sampling
from draftsmith.core.target import Target
from draftsmith.core.tree import Draft
from draftsmith.drafters.ngram.kneser_ney import KneserNey
from draftsmith.length import policies
from draftsmith.parts.checks import MAX_NODES, check_at_least, check_below_one
from draftsmith.parts.retrieval import source_tokens
from draftsmith.parts.trie import TokenTree, build_trie, to_draft


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the n-gram model, the cache and the drafts."""

    order: int = 5
    """Length of the longest n-gram; contexts have one token less."""
    num_draft: int = 12
    """Maximum number of tokens drafted per round."""
    length: str = "confidence=0.3"
    """Draft-length policy (draftsmith/length/policies.py)."""
    sampled: bool = True
    """Sample drafts if the temperature is not 0; otherwise draft the likeliest tokens at any temperature."""
    cache: float = 0.3
    """Weight of the tokens that followed the same context earlier in the row or in the source; 0 for none."""

    def __post_init__(self) -> None:
        policies.make(self.length)
        if not 1 <= self.order <= 5:
            raise ValueError(f"order is {self.order}; it must be 1 to 5")
        check_at_least(self, 1, "num_draft", most=MAX_NODES)
        check_below_one(self, "cache")

    @property
    def supports_early_stop(self) -> bool:
        return True


class Drafter(drafter.Drafter):
    """Drafts from the distribution of `model`, interpolated for each row with the statistics of its own text.

    P_0 is Kneser-Ney's distribution. For k = 1, 2, ... while the last k tokens occur earlier in the row's text,
    P_k = (1 - cache) P_(k-1) + cache E_k, where E_k(w) is the share of their occurrences that w followed. The last P_k
    is used.
    """

    row_state = ("_caches",)
    serving_engines = ("vllm", "llama.cpp")

    def __init__(self, config: Config, target: Target, model: KneserNey | None = None) -> None:
        self.config = config
        self.target = target
        self.model = KneserNey.empty(target.vocab_size) if model is None else model

    def save_state(self, folder: Path) -> None:
        self.model.save(folder)

    @classmethod
    def load_state(cls, folder: Path, config: Config, target: Target) -> Self:
        return cls(config, target, KneserNey.load(folder, target.vocab_size))

    def start(self, session: Session) -> None:
        self._session = session
        self._caches = [_TextCache(source, self.config) for source in source_tokens(session)]

    def propose(self, budget: int) -> Draft:
        num_draft = min(budget, self.config.num_draft)
        for cache, row in zip(self._caches, self._session.rows, strict=True):
            cache.extend(row)
        if self.config.sampled and not self._session.sampling.is_greedy:
            return self._sampled_chains(num_draft)
        return to_draft(self._session, [self._likeliest(row, num_draft) for row in range(len(self._caches))])

    def observe(self, step: Step) -> None:
        """Does nothing: the next `propose` reads the new tokens."""

    def _likeliest(self, row: int, num_draft: int) -> TokenTree:
        """Returns the chain of the likeliest tokens, weighted by their probability."""
        found = TokenTree()
        while len(found.tokens) < num_draft:
            token, probability = self._best(row, self._recent(row, found.tokens))
            found.parents.append(len(found.tokens))
            found.weights.append(probability * (found.weights[-1] if found.weights else 1.0))
            found.tokens.append(token)
            if not self._session.should_continue(row, probability):
                break
        return found

    def _best(self, row: int, recent: list[int]) -> tuple[int, float]:
        """Returns the likeliest token and its probability, or a lower bound of it that proves it the likeliest.

        Candidates are the tokens that followed in the text and the model's likeliest one: the cache adds nothing to the
        others.
        """
        path = self.model.path(recent)
        token, probability = self.model.best(path)
        following_S, weights_S, left = self._caches[row].following(recent)
        if len(following_S) == 0:
            return token, probability
        most, weight, second = following_S.item(0), weights_S.item(0), 0.0
        if len(following_S) > 1:
            following_S, index_S = np.unique(following_S, return_inverse=True)
            weights_S = np.bincount(index_S, weights_S)
            order_S = weights_S.argsort()
            most, weight, second = following_S.item(order_S[-1]), weights_S.item(order_S[-1]), weights_S[order_S[-2]]
        if most == token:
            return token, left * probability + weight
        # The model gives no other token more than `probability`, which is rounded.
        if weight > 1.001 * left * probability + second:
            return most, weight
        found_S = np.append(following_S, token)
        weights_S = np.append(weights_S, weights_S[following_S == token].sum())
        probs_S = left * self.model.token_probs(path, found_S) + weights_S
        most = int(probs_S.argmax())
        return found_S.item(most), probs_S.item(most)

    def _probs(self, row: int, recent: list[int]) -> np.ndarray:
        """Returns the distribution [V] of the next token."""
        following_S, weights_S, left = self._caches[row].following(recent)
        probs_V = left * self.model.probs(self.model.path(recent))
        return probs_V + np.bincount(following_S, weights_S, minlength=len(probs_V)) if len(following_S) else probs_V

    def _sampled_chains(self, num_draft: int) -> Draft:
        """Returns chains sampled from the distribution after the session's temperature, top-k and top-p."""
        session = self._session
        chains: list[list[int]] = [[] for _ in session.rows]
        probs: list[list[Tensor]] = [[] for _ in session.rows]
        running = list(range(len(session.rows)))
        for position in range(num_draft):
            probs_GV = torch.from_numpy(np.stack([self._probs(row, self._recent(row, chains[row])) for row in running]))
            if session.sampling != Sampling(temperature=1):
                probs_GV = session.sampling.probs(probs_GV.log())
            # Rounded before sampling: the verifier needs exactly the distribution that was sampled from.
            probs_GV = probs_GV.float()
            token_G = session.draw(probs_GV.double(), position, running)
            confidence_G = probs_GV.gather(1, token_G[:, None])[:, 0]
            for row, probs_V, token in zip(running, probs_GV, token_G.tolist(), strict=True):
                chains[row].append(token)
                probs[row].append(probs_V)
            running = [
                row
                for row, confidence in zip(running, confidence_G.tolist(), strict=True)
                if session.should_continue(row, confidence)
            ]
            if not running:
                break
        draft = to_draft(self._session, [build_trie([(tokens, 1.0)]) for tokens in chains])
        for own in probs:
            own += [own[-1]] * (draft.tree.depth - len(own))
        probs_BNV = torch.stack([torch.stack(own) for own in probs]).to(self.target.device)
        return replace(draft, draft_probs_BNV=probs_BNV, sampling_scheme="independent")

    def _recent(self, row: int, drafted: list[int]) -> list[int]:
        """Returns the last tokens, as many as the longest context has or more."""
        return [*self._session.rows[row][-self.config.order :], *drafted]


class _TextCache:
    """One row's text, after its source if there is one, searched for the tokens that followed a context."""

    def __init__(self, source: list[int], config: Config) -> None:
        self._weight, self._most = config.cache, max(config.order - 1, 1)
        # The padding before the text equals no token.
        self._ids = np.array([-1] * self._most + source)
        self._num_before = len(self._ids)

    def extend(self, row: list[int]) -> None:
        """Adds the row's new tokens."""
        self._ids = np.concatenate([self._ids, np.array(row[len(self._ids) - self._num_before :], dtype=np.int64)])

    def following(self, recent: list[int]) -> tuple[np.ndarray, np.ndarray, float]:
        """Returns the tokens that followed the last ones of `recent`, their weights, and the weight of the model."""
        ids, kept = self._ids, 1 - self._weight
        positions_S = (ids[:-1] == recent[-1]).nonzero()[0] if self._weight else ids[:0]
        found = []
        while len(positions_S):
            found.append(positions_S)
            back = len(found)
            if back == min(self._most, len(recent)):
                break
            positions_S = positions_S[ids[positions_S - back] == recent[-1 - back]]
        if not found:
            return ids[:0], ids[:0], 1.0
        left, following_S = kept ** len(found), ids[found[0] + 1]
        if len(following_S) == 1 or (following_S == following_S[0]).all():
            return following_S[:1], np.array([1 - left]), left
        weights = [self._weight * kept ** (len(found) - number) / len(one) for number, one in enumerate(found, start=1)]
        return ids[np.concatenate(found) + 1], np.repeat(weights, [len(one) for one in found]), left
