"""Kneser-Ney n-grams of what the target writes, with the text at hand mixed in: chains by an exact law.

Shape suffixes: B rows, G rows still drafting, N nodes, V vocabulary, S tokens that followed in a text, X places.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor

from draftsmith.core import drafter
from draftsmith.core.drafter import Session, Step
from draftsmith.core.sampling import Sampling, draw
from draftsmith.core.target import Target
from draftsmith.core.tree import Draft
from draftsmith.drafters.ngram.kneser_ney import KneserNey
from draftsmith.length import policies
from draftsmith.parts.trie import to_draft, build_trie


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is drafted by the store's law and the text at hand."""

    order: int = 5
    """Tokens of the longest n-gram: the law goes by one token less."""
    num_draft: int = 12
    """Most tokens drafted at a time."""
    length: str = "confidence=0.3"
    """How long its chains are: a policy of draftsmith/length/policies.py, and its number."""
    sampled: bool = True
    """Whether, at a temperature, tokens are drawn from the law; else they are the likeliest, as when greedy."""
    cache: float = 0.3
    """Weight of what followed the same tokens earlier in the row, or in an encoder's text; 0 for none."""

    def __post_init__(self) -> None:
        policies.make(self.length)
        if not 1 <= self.order <= 5:
            raise ValueError(f"order is {self.order}; it must be 1 to 5")
        if self.num_draft < 1:
            raise ValueError(f"num_draft is {self.num_draft}; it must be at least 1")
        if not 0 <= self.cache < 1:
            raise ValueError(f"cache is {self.cache}; it must be at least 0 and below 1")

    @property
    def supports_early_stop(self) -> bool:
        return True


class Drafter(drafter.Drafter):
    """The law of `model`, mixed for each row with what its own text holds.

    P_0 is Kneser-Ney's. For k = 1, 2, ... as long as the last k tokens stand in the row's text before,
    P_k = (1 - cache) P_(k-1) + cache E_k, where E_k(w) is the share of those places at which w followed. Each is a law,
    and so is their last.
    """

    serving_engines = ("vllm",)

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
        sources: list[list[int]] = [[] for _ in session.rows]
        if session.source is not None:
            mask = session.source.mask_BT.bool()
            sources = [ids[kept].tolist() for ids, kept in zip(session.source.tokens_BT, mask, strict=True)]
        self._texts = [_Text(source, self.config) for source in sources]

    def propose(self, budget: int) -> Draft:
        num_draft = min(budget, self.config.num_draft)
        for text, row in zip(self._texts, self._session.rows, strict=True):
            text.extend(row)
        if self.config.sampled and not self._session.sampling.is_greedy:
            return self._drawn(num_draft)
        return self._chains([self._likeliest(row, num_draft) for row in range(len(self._texts))])

    def observe(self, step: Step) -> None:
        """Nothing to learn: the next `propose` reads the new tokens."""

    def _likeliest(self, row: int, num_draft: int) -> list[int]:
        """Returns the chain of the law's likeliest tokens."""
        drafted: list[int] = []
        while len(drafted) < num_draft:
            token, chance = self._best(row, self._recent(row, drafted))
            drafted.append(token)
            if not self._session.should_continue(row, chance):
                break
        return drafted

    def _best(self, row: int, recent: list[int]) -> tuple[int, float]:
        """Returns the likeliest token and its probability, or a bound below it that already says that it is.

        It is one that followed in the text, or the store's own likeliest: to no other does the text give anything.
        """
        path = self.model.path(recent)
        token, chance = self.model.best(path)
        following_S, weights_S, left = self._texts[row].following(recent)
        if len(following_S) == 0:
            return token, chance
        most, weight, second = following_S.item(0), weights_S.item(0), 0.0
        if len(following_S) > 1:
            following_S, places_S = np.unique(following_S, return_inverse=True)
            weights_S = np.bincount(places_S, weights_S)
            order_S = weights_S.argsort()
            most, weight, second = following_S.item(order_S[-1]), weights_S.item(order_S[-1]), weights_S[order_S[-2]]
        if most == token:
            return token, left * chance + weight
        # The store gives no other token more than `chance`, which is rounded.
        if weight > 1.001 * left * chance + second:
            return most, weight
        found_S = np.append(following_S, token)
        weights_S = np.append(weights_S, weights_S[following_S == token].sum())
        chances_S = left * self.model.chances(path, found_S) + weights_S
        most = int(chances_S.argmax())
        return found_S.item(most), chances_S.item(most)

    def _law(self, row: int, recent: list[int]) -> np.ndarray:
        """Returns the law [V] of the next token."""
        following_S, weights_S, left = self._texts[row].following(recent)
        probs_V = left * self.model.probs(self.model.path(recent))
        return probs_V + np.bincount(following_S, weights_S, minlength=len(probs_V)) if len(following_S) else probs_V

    def _drawn(self, num_draft: int) -> Draft:
        """Returns chains whose tokens are drawn from the law, after the session's temperature, top-k and top-p."""
        session = self._session
        uniforms_BX = torch.rand(len(session.rows), num_draft, generator=session.generator, dtype=torch.float64)
        chains: list[list[int]] = [[] for _ in session.rows]
        laws: list[list[Tensor]] = [[] for _ in session.rows]
        going = list(range(len(session.rows)))
        for place in range(num_draft):
            probs_GV = torch.from_numpy(np.stack([self._law(row, self._recent(row, chains[row])) for row in going]))
            if session.sampling != Sampling(temperature=1):
                probs_GV = session.sampling.probs(probs_GV.log())
            # Rounded before anything is drawn: the verifier must be told the very law that was drawn from.
            probs_GV = probs_GV.float()
            token_G = draw(probs_GV.double(), uniforms_BX[going, place])
            chance_G = probs_GV.gather(1, token_G[:, None])[:, 0]
            for row, probs_V, token in zip(going, probs_GV, token_G.tolist(), strict=True):
                chains[row].append(token)
                laws[row].append(probs_V)
            going = [row for row, chance in zip(going, chance_G.tolist(), strict=True) if session.should_continue(row, chance)]
            if not going:
                break
        draft = self._chains(chains)
        for own in laws:
            own += [own[-1]] * (draft.tree.depth - len(own))
        probs_BNV = torch.stack([torch.stack(own) for own in laws]).to(self.target.device)
        return replace(draft, draft_probs_BNV=probs_BNV, sampling_scheme="independent")

    def _recent(self, row: int, drafted: list[int]) -> list[int]:
        """Returns the last tokens, as many as any context has."""
        return [*self._session.rows[row][-self.config.order :], *drafted]

    def _chains(self, chains: list[list[int]]) -> Draft:
        return to_draft(self._session, [build_trie([(tokens, 1.0)]) for tokens in chains])


class _Text:
    """One row's text, an encoder's before it, and what followed in it."""

    def __init__(self, source: list[int], config: Config) -> None:
        self._weight, self._most = config.cache, max(config.order - 1, 1)
        # What stands before the text equals no token.
        self._ids = np.array([-1] * self._most + source)
        self._num_before = len(self._ids)

    def extend(self, row: list[int]) -> None:
        """Takes up the row's new tokens."""
        self._ids = np.concatenate([self._ids, np.array(row[len(self._ids) - self._num_before :], dtype=np.int64)])

    def following(self, recent: list[int]) -> tuple[np.ndarray, np.ndarray, float]:
        """Returns what followed the last tokens of `recent`, the weight of each in the law, and that of the store."""
        ids, kept = self._ids, 1 - self._weight
        places_S = (ids[:-1] == recent[-1]).nonzero()[0] if self._weight else ids[:0]
        found = []
        while len(places_S):
            found.append(places_S)
            back = len(found)
            if back == min(self._most, len(recent)):
                break
            places_S = places_S[ids[places_S - back] == recent[-1 - back]]
        if not found:
            return ids[:0], ids[:0], 1.0
        left, following_S = kept ** len(found), ids[found[0] + 1]
        if len(following_S) == 1 or (following_S == following_S[0]).all():
            return following_S[:1], np.array([1 - left]), left
        weights = [self._weight * kept ** (len(found) - number) / len(one) for number, one in enumerate(found, start=1)]
        return ids[np.concatenate(found) + 1], np.repeat(weights, [len(one) for one in found]), left
