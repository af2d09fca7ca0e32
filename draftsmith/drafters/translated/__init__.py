"""A small causal LM with a vocabulary of its own, not the target's (2502.05202).

Greedily it drafts in its own vocabulary, and its text is put into the target's (universal assisted generation).
Sampling, it drafts by its law over the tokens that both have, as a law over the target's vocabulary (token-level
intersection), which any verifier takes. The target keeps all its tokens: the others come from the residual.

Shape suffixes: B rows, T tokens not yet read, N nodes, U own vocabulary, V the target's, S tokens in both.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from draftsmith.core import drafter
from draftsmith.core.drafter import Session, Step
from draftsmith.core.model_info import TargetInfo, tokenizer_hash
from draftsmith.core.target import Target
from draftsmith.core.tree import Draft, Tree, chain
from draftsmith.drafters.translated.spelling import BOS, EOS, Translation, Vocabulary
from draftsmith.parts import autoregressive, trie
from draftsmith.verify.paths import values_at

TOKENIZER = "tokenizer.json"


@dataclass(frozen=True, kw_only=True)
class Config:
    """The draft model's own configuration and vocabulary, and how it drafts."""

    model: dict[str, Any]
    """The transformers configuration of the draft model, `model_type` included."""
    tokenizer_hash: str = ""
    """Of the draft model's tokenizer, which lies in the artifact."""
    counterparts: tuple[int, ...] = ()
    """The target's id of each token of the draft model, -1 for none, where there are no tokenizers to tell."""
    num_draft: int = 8
    """Most tokens of its own that the draft model drafts at a time."""
    confidence: float = 0.4
    """Drafting ends after a token less likely than this; 0 never ends it."""
    lookback: int = 10
    """Tokens before what is new that are put into the other vocabulary again."""

    def __post_init__(self) -> None:
        if "model_type" not in self.model or "vocab_size" not in self.model:
            raise ValueError("the draft model's configuration names no model_type or no vocab_size")
        if self.num_draft < 1 or self.lookback < 1:
            raise ValueError(f"num_draft {self.num_draft} and lookback {self.lookback} must be at least 1")
        if not 0 <= self.confidence < 1:
            raise ValueError(f"confidence is {self.confidence}; it must be at least 0 and below 1")
        if bool(self.counterparts) == bool(self.tokenizer_hash):
            raise ValueError("one of tokenizer_hash and counterparts must be given, and not both")
        known = [token for token in self.counterparts if token != -1]
        if len(set(known)) < len(known) or min(known, default=0) < 0:
            raise ValueError("counterparts must be -1 or ids of the target, none of them twice")
        if self.counterparts and len(self.counterparts) != self.model["vocab_size"]:
            raise ValueError(
                f"there are {len(self.counterparts)} counterparts and {self.model['vocab_size']} tokens in the draft"
                " model's vocabulary; they must be as many"
            )


def translation(config: Config, tokenizer: Any, target: Target | TargetInfo) -> Translation:
    """Returns the way between the two vocabularies; raises ValueError where there is no telling, or none to go."""
    if config.counterparts:
        if max(config.counterparts) >= target.vocab_size:
            raise ValueError(f"counterpart {max(config.counterparts)} is outside {target.name}'s vocabulary")
        own, theirs = Vocabulary.of_ids(config.counterparts), Vocabulary.of_ids(range(target.vocab_size))
        return Translation(own, theirs, config.lookback)
    if tokenizer_hash(tokenizer) != config.tokenizer_hash:
        raise ValueError("the tokenizer given is not the one that the draft model was made with")
    if target.tokenizer is None:
        raise ValueError(f"target {target.name} has no tokenizer, which its vocabulary is compared by")
    own = Vocabulary.of(tokenizer, config.model["vocab_size"], _parts(config.model))
    theirs_config = {"bos_token_id": target.tokenizer.bos_token_id, "eos_token_id": target.tokenizer.eos_token_id}
    theirs = Vocabulary.of(target.tokenizer, target.vocab_size, _parts(theirs_config))
    return Translation(own, theirs, config.lookback)


def _parts(model: dict[str, Any]) -> dict[int, str]:
    """Returns the special ids that a configuration names."""
    ends = model.get("eos_token_id")
    ends = ends if isinstance(ends, list | tuple) else [ends]
    named = {model.get("bos_token_id"): BOS} | dict.fromkeys(ends, EOS)
    return {token: name for token, name in named.items() if token is not None}


class Drafter(nn.Module, drafter.Drafter):
    """The draft model, with a cache of its own that goes back to where the text came to be spelled otherwise."""

    draft_model: Target
    counterparts_U: Tensor
    """The target's id of each token of the draft model, -1 for none."""
    def __init__(self, config: Config, target: Target, tokenizer: Any = None) -> None:
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        self.translation = translation(config, tokenizer, target)
        self.register_buffer("counterparts_U", torch.tensor(self.translation.counterparts()))
        if not (self.counterparts_U >= 0).any():
            raise ValueError(f"the draft model's vocabulary and that of {target.name} have no token in common")
        settings = {key: value for key, value in config.model.items() if key != "model_type"}
        self.model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config.model["model_type"], **settings))
        self.to(device=target.device, dtype=target.dtype).eval()
        object.__setattr__(self, "target", target)
        # The loop's own machinery runs the draft model too; a plain attribute would register its weights twice.
        object.__setattr__(self, "draft_model", Target(self.model))

    def save_state(self, folder: Path) -> None:
        """Writes the draft model's tokenizer, if it has one."""
        if self.tokenizer is not None:
            self.tokenizer.backend_tokenizer.save(str(folder / TOKENIZER))

    @classmethod
    def load_state(cls, folder: Path, config: Config, target: Target) -> Self:
        """Returns the drafter, its weights not yet read; raises ValueError for a missing or another tokenizer."""
        if config.counterparts:
            return cls(config, target)
        file = folder / TOKENIZER
        try:
            tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(file))
        except Exception as error:  # the library raises bare exceptions
            reason = " ".join(str(error).split())
            raise ValueError(
                f"{file} is missing or no tokenizer ({reason}); the artifact must be made again"
            ) from error
        if tokenizer_hash(tokenizer) != config.tokenizer_hash:
            raise ValueError(f"{file} is not the tokenizer that the draft model was made with")
        return cls(config, target, tokenizer)

    def start(self, session: Session) -> None:
        self._session = dataclasses.replace(session, should_continue=self._should_continue)
        self._num_known = [len(row) for row in session.rows]
        self._own = [self.translation.begin(row) for row in session.rows]
        self._read = [ids[:-1] for ids in self._own]
        self._cache = self.draft_model.new_cache(len(session.rows))
        if 0 < max(map(len, self._read)) < self.draft_model.context_length:
            self.draft_model.prefill(self._read, self._cache)
        self._own_S = (self.counterparts_U >= 0).nonzero()[:, 0]
        self._theirs_S = self.counterparts_U[self._own_S]
        self._own_V = self.counterparts_U.new_full((self.target.vocab_size,), -1)
        self._own_V[self._theirs_S] = self._own_S

    def propose(self, budget: int) -> Draft:
        session = self._session
        self._follow()
        room = min(self.config.num_draft, self.draft_model.context_length - max(map(len, self._own)))
        if room < 1:
            return session.empty_draft()
        if not session.sampling.is_greedy:
            return autoregressive.draft_chain(self._shared_model, session, min(room, budget))
        own = autoregressive.draft_chain(self._own_model, dataclasses.replace(session, rows=self._own), room)
        num_nodes = own.num_nodes or [own.tree.num_nodes] * len(session.rows)
        drafted = [tokens[1:used] for tokens, used in zip(own.tokens_BN.tolist(), num_nodes, strict=True)]
        ahead = map(self.translation.ahead, session.rows, self._own, drafted)
        return trie.to_draft(session, [trie.build_trie([(ids[:budget], 1.0)]) for ids in ahead])

    def observe(self, step: Step) -> None:
        """Nothing to learn: the next `propose` reads the new tokens."""

    def _should_continue(self, row: int, confidence: float) -> bool:
        return confidence >= self.config.confidence

    def _follow(self) -> None:
        """Brings the draft model's ids up to the text, and its cache back to where these begin to differ."""
        for number, row in enumerate(self._session.rows):
            if len(row) > self._num_known[number]:
                self._own[number] = self.translation.follow(self._own[number], row, self._num_known[number])
                self._num_known[number] = len(row)
            own, read = self._own[number], self._read[number]
            pairs = zip(own[:-1], read, strict=False)
            shared = next((place for place, (one, other) in enumerate(pairs) if one != other), None)
            self._cache.lengths[number] = min(len(own) - 1, len(read)) if shared is None else shared

    def _own_model(self, tokens_BN: Tensor, tree: Tree, first: int) -> Tensor:
        """Returns the draft model's logits [B, 1, U] after the last node."""
        return self._logits(tokens_BN[:, 1:].tolist())

    def _shared_model(self, tokens_BN: Tensor, tree: Tree, first: int) -> Tensor:
        """Returns the logits [B, 1, V] of the tokens in both vocabularies after the last node, none for the others."""
        logits_B1U = self._logits(self._own_V[tokens_BN[:, 1:]].tolist())
        logits_B1V = logits_B1U.new_full((*logits_B1U.shape[:2], self.target.vocab_size), float("-inf"))
        logits_B1V[..., self._theirs_S] = logits_B1U[..., self._own_S]
        return logits_B1V

    def _logits(self, drafted: list[list[int]]) -> Tensor:
        """Reads the rows' ids and those drafted after them, so far as it has not, and returns the last's logits."""
        self._read = [own + more for own, more in zip(self._own, drafted, strict=True)]
        missing = [ids[length:] for ids, length in zip(self._read, self._cache.lengths, strict=True)]
        longest, device = max(map(len, missing)), self.draft_model.device
        missing_BT = torch.tensor([ids + [0] * (longest - len(ids)) for ids in missing], device=device)
        out = self.draft_model.forward(missing_BT, chain(longest, device), self._cache)
        self._cache.commit([list(range(len(ids))) for ids in missing])
        last_B = torch.tensor([len(ids) - 1 for ids in missing], device=device)
        return self.draft_model.logits(values_at(out.hidden_BND, last_B)[:, None])
