"""A small causal LM with a vocabulary different from the target's (2502.05202).

At temperature 0 it drafts in its own vocabulary, and its text is re-encoded in the target's (universal assisted
generation). Otherwise it samples from its distribution over the tokens in both vocabularies, which is a distribution
over the target's vocabulary that every verifier takes (token-level intersection). The target's other tokens come from
the residual.

Shape suffixes: B rows, T tokens not yet processed, N nodes, U draft model's vocabulary, V target's vocabulary, S tokens
in both.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from draftsmith.artifacts.files import inside
from draftsmith.core import drafter
from draftsmith.core.drafter import Session, Step
from draftsmith.core.target import Target
from draftsmith.core.tree import Draft, Tree, chain
from draftsmith.drafters.translated.spelling import BOS, EOS, Translation, Vocabulary
from draftsmith.loading.model_info import TargetInfo, tokenizer_hash
from draftsmith.loading.precision import KeepsPrecision
from draftsmith.parts import autoregressive, trie
from draftsmith.parts.checks import MAX_NODES, check_at_least, check_below_one, check_model
from draftsmith.parts.suffix_array import num_common
from draftsmith.verify.paths import values_at

TOKENIZER = "tokenizer.json"


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the draft model, its vocabulary and its drafts."""

    model: dict[str, Any]
    """The transformers configuration of the draft model, `model_type` included."""
    tokenizer_hash: str = ""
    """Hash of the draft model's tokenizer, which is in the artifact."""
    counterparts: tuple[int, ...] = ()
    """The target's id of each token of the draft model, -1 for none; used instead of tokenizers."""
    num_draft: int = 8
    """Maximum number of tokens drafted per round, in the draft model's vocabulary."""
    confidence: float = 0.4
    """Drafting stops after a token of lower probability; 0 never stops it."""
    lookback: int = 10
    """Number of tokens before new ones that are encoded again in the other vocabulary."""

    def __post_init__(self) -> None:
        if "model_type" not in self.model or "vocab_size" not in self.model:
            raise ValueError("the draft model's configuration must have model_type and vocab_size")
        check_at_least(self, 1, "num_draft", "lookback", most=MAX_NODES)
        check_model(self.model)
        check_below_one(self, "confidence")
        if bool(self.counterparts) == bool(self.tokenizer_hash):
            raise ValueError("give either tokenizer_hash or counterparts, not both or neither")
        known = [token for token in self.counterparts if token != -1]
        if len(set(known)) < len(known) or min(known, default=0) < 0:
            raise ValueError("counterparts must be -1 or ids of the target, each at most once")
        if self.counterparts and len(self.counterparts) != self.model["vocab_size"]:
            raise ValueError(
                f"there are {len(self.counterparts)} counterparts and {self.model['vocab_size']} tokens in the draft"
                " model's vocabulary; these numbers must be equal"
            )


def translation(config: Config, tokenizer: Any, target: Target | TargetInfo) -> Translation:
    """Returns the translation between the vocabularies; raises ValueError if they cannot be compared."""
    if config.counterparts:
        if max(config.counterparts) >= target.vocab_size:
            raise ValueError(f"counterpart {max(config.counterparts)} is outside {target.name}'s vocabulary")
        draft_ids, target_ids = Vocabulary.of_ids(config.counterparts), Vocabulary.of_ids(range(target.vocab_size))
        return Translation(draft_ids, target_ids, config.lookback)
    if tokenizer_hash(tokenizer) != config.tokenizer_hash:
        raise ValueError("the tokenizer given is not the one that the draft model was made with")
    if target.tokenizer is None:
        raise ValueError(f"target {target.name} has no tokenizer, which is needed to compare the vocabularies")
    draft_vocabulary = Vocabulary.of(tokenizer, config.model["vocab_size"], _special_ids(config.model))
    target_config = {"bos_token_id": target.tokenizer.bos_token_id, "eos_token_id": target.tokenizer.eos_token_id}
    target_vocabulary = Vocabulary.of(target.tokenizer, target.vocab_size, _special_ids(target_config))
    return Translation(draft_vocabulary, target_vocabulary, config.lookback)


def _special_ids(model: dict[str, Any]) -> dict[int, str]:
    """Returns the names of the special ids in a configuration."""
    ends = model.get("eos_token_id")
    ends = ends if isinstance(ends, list | tuple) else [ends]
    named = {model.get("bos_token_id"): BOS} | dict.fromkeys(ends, EOS)
    return {token: name for token, name in named.items() if token is not None}


class Drafter(KeepsPrecision, drafter.Drafter):
    """The draft model with a cache of its own, which is rewound to where the translated text changes."""

    row_state = ("_cache", "_num_known", "_draft_ids", "_processed")
    has_draft_model = True
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
        made = AutoConfig.for_model(config.model["model_type"], **settings)
        self.model = AutoModelForCausalLM.from_config(made, dtype=target.dtype, trust_remote_code=False)
        self.to(device=target.device, dtype=target.dtype).eval()
        object.__setattr__(self, "target", target)
        # Hidden from the module, which would register the weights twice.
        object.__setattr__(self, "draft_model", Target(self.model))
        if self.draft_model.is_recurrent:
            kind = type(self.model).__name__
            raise ValueError(f"the draft model, {kind}, has recurrent layers, whose state cannot be set back")

    def save_state(self, folder: Path) -> None:
        """Writes the draft model's tokenizer, if it has one."""
        if self.tokenizer is not None:
            self.tokenizer.backend_tokenizer.save(str(folder / TOKENIZER))

    @classmethod
    def load_state(cls, folder: Path, config: Config, target: Target) -> Self:
        if config.counterparts:
            return cls(config, target)
        file = inside(folder, TOKENIZER)
        try:
            tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(file))
        except Exception as error:  # the library raises bare exceptions
            reason = " ".join(str(error).split())
            raise ValueError(
                f"{file} is missing or not a tokenizer ({reason}); the artifact must be made again"
            ) from error
        if tokenizer_hash(tokenizer) != config.tokenizer_hash:
            raise ValueError(f"{file} is not the tokenizer that the draft model was made with")
        return cls(config, target, tokenizer)

    def start(self, session: Session) -> None:
        self._session = dataclasses.replace(session, should_continue=self._should_continue)
        self._num_known = [len(row) for row in session.rows]
        self._draft_ids = [self.translation.to_draft_ids(row) for row in session.rows]
        self._processed = [ids[:-1] for ids in self._draft_ids]
        self._cache = self.draft_model.new_cache(len(session.rows))
        if 0 < max(map(len, self._processed)) < self.draft_model.context_length:
            self.draft_model.prefill(self._processed, self._cache)
        self._draft_ids_S = (self.counterparts_U >= 0).nonzero()[:, 0]
        self._target_ids_S = self.counterparts_U[self._draft_ids_S]
        self._draft_ids_V = self.counterparts_U.new_full((self.target.vocab_size,), -1)
        self._draft_ids_V[self._target_ids_S] = self._draft_ids_S

    def propose(self, budget: int) -> Draft:
        session = self._session
        self._extend()
        room = min(self.config.num_draft, self.draft_model.context_length - max(map(len, self._draft_ids)))
        if room < 1:
            return session.empty_draft()
        if not session.sampling.is_greedy:
            return autoregressive.draft_chain(self._target_vocab_logits, session, min(room, budget))
        draft = autoregressive.draft_chain(
            self._draft_vocab_logits, dataclasses.replace(session, rows=self._draft_ids), room
        )
        num_nodes = draft.num_nodes or [draft.tree.num_nodes] * len(session.rows)
        drafted = [tokens[1:used] for tokens, used in zip(draft.tokens_BN.tolist(), num_nodes, strict=True)]
        translated = map(self.translation.new_target_ids, session.rows, self._draft_ids, drafted)
        return trie.to_draft(session, [trie.build_trie([(ids[:budget], 1.0)]) for ids in translated])

    def observe(self, step: Step) -> None:
        """Does nothing: the next `propose` reads the new tokens."""

    def _should_continue(self, row: int, confidence: float) -> bool:
        return confidence >= self.config.confidence

    def _extend(self) -> None:
        """Extends the draft model's ids by the committed text, and rewinds its cache to the first changed id."""
        for number, row in enumerate(self._session.rows):
            if len(row) > self._num_known[number]:
                self._draft_ids[number] = self.translation.extend_draft_ids(
                    self._draft_ids[number], row, self._num_known[number]
                )
                self._num_known[number] = len(row)
            self._cache.lengths[number] = num_common(self._draft_ids[number][:-1], self._processed[number])

    def _draft_vocab_logits(self, tokens_BN: Tensor, tree: Tree, first: int) -> Tensor:
        """Returns the logits [B, 1, U] after the last node, in the draft model's vocabulary."""
        return self._logits(tokens_BN[:, 1:].tolist())

    def _target_vocab_logits(self, tokens_BN: Tensor, tree: Tree, first: int) -> Tensor:
        """Returns the logits [B, 1, V] after the last node, in the target's vocabulary; -inf for tokens not in both."""
        logits_B1U = self._logits(self._draft_ids_V[tokens_BN[:, 1:]].tolist())
        logits_B1V = logits_B1U.new_full((*logits_B1U.shape[:2], self.target.vocab_size), float("-inf"))
        logits_B1V[..., self._target_ids_S] = logits_B1U[..., self._draft_ids_S]
        return logits_B1V

    def _logits(self, drafted: list[list[int]]) -> Tensor:
        """Processes the drafted and committed ids that the cache lacks; returns the logits after the last."""
        self._processed = [ids + more for ids, more in zip(self._draft_ids, drafted, strict=True)]
        missing = [ids[length:] for ids, length in zip(self._processed, self._cache.lengths, strict=True)]
        longest, device = max(map(len, missing)), self.draft_model.device
        missing_BT = torch.tensor([ids + [0] * (longest - len(ids)) for ids in missing], device=device)
        out = self.draft_model.forward(missing_BT, chain(longest, device), self._cache)
        self._cache.commit([list(range(len(ids))) for ids in missing])
        last_B = torch.tensor([len(ids) - 1 for ids in missing], device=device)
        return self.draft_model.logits(values_at(out.hidden_BND, last_B)[:, None])
