"""Token-only drafters inside vLLM, through its speculative method `custom_class` (0.32 and 0.33).

vLLM passes the tokens of every request to such a class, but neither hidden states nor logits. It verifies chains and
treats them as deterministic drafts at any temperature. Each request has its own drafter; all share weights and state.

Shape suffixes: B requests of a batch, T tokens of one.
"""

import copy
import os
import time
from typing import Any, cast

import numpy as np
import torch

from draftsmith.artifacts import artifact
from draftsmith.core.cache import KVCache
from draftsmith.core.drafter import Session, Step
from draftsmith.core.sampling import Sampling
from draftsmith.core.target import Target
from draftsmith.core.tree import Draft, Verdict
from draftsmith.export import tokens, writers
from draftsmith.export.launch import ARTIFACT_VARIABLE
from draftsmith.length.controller import with_length_control
from draftsmith.serving.tokens import TokenTarget


class Proposer:
    """Drafts for vLLM, with the artifact's own length policy and at most num_speculative_tokens.

    Requests are recognised by their tokens, because vLLM passes no request ids, moves requests between slots and
    preempts them. The number of accepted tokens is inferred from the tokens that follow a draft. Raises ValueError if
    the artifact is not a token-only drafter or was made for another target.
    """

    def __init__(self, vllm_config: Any) -> None:
        path = os.environ.get(ARTIFACT_VARIABLE)
        if not path:
            raise ValueError(f"{ARTIFACT_VARIABLE} is not set; set it to the artifact, as in the export's launch.json")
        model = vllm_config.model_config
        self._num_draft = int(vllm_config.speculative_config.num_speculative_tokens)
        self._max_length = int(model.max_model_len)
        device = torch.device(vllm_config.device_config.device)
        # Sizes are known without weights, so that a wrong artifact is rejected before weights load.
        self._target = cast(Target, TokenTarget(model.model, model.dtype, device))
        family = artifact.read_manifest(path)["family"]
        if not _is_token_only(family):
            raise ValueError(
                f"artifact {path} is of family {family!r}, whose drafters read hidden states or change the target;"
                " vLLM passes tokens only"
            )
        self._drafter = artifact.load(path, self._target)
        # The first start prepares the weights for single steps, once for all requests.
        self._drafter.start(self._session([0]))
        self._drafter.forget()
        self._requests: list[_Request] = []
        self._slots: dict[int, _Request] = {}
        self._last_s = time.perf_counter()

    def load_model(self, target_model: Any, *_: Any, **__: Any) -> None:
        """Does nothing: the constructor has loaded everything."""

    @torch.inference_mode()
    def propose(
        self,
        sampled_token_ids: list[list[int]],
        num_tokens_no_spec: np.ndarray,
        token_ids_cpu: np.ndarray,
        slot_mappings: Any = None,
    ) -> list[list[int]]:
        """Returns a chain for each slot, empty where no token was sampled or the context is full.

        `token_ids_cpu` [B, T] contains the tokens of each slot, `num_tokens_no_spec` [B] their number; the tokens
        sampled in this step are the last.
        """
        now_s = time.perf_counter()
        cost_ms, self._last_s = 1e3 * (now_s - self._last_s), now_s
        rooms = [min(self._num_draft, self._max_length - int(number) - 1) for number in num_tokens_no_spec]
        texts = {
            slot: token_ids_cpu[slot, : num_tokens_no_spec[slot]]
            for slot, sampled in enumerate(sampled_token_ids)
            if sampled and rooms[slot] > 0
        }
        self._assign(texts)
        drafts: list[list[int]] = [[] for _ in sampled_token_ids]
        for slot, text_T in texts.items():
            drafts[slot] = self._slots[slot].draft(text_T, rooms[slot], cost_ms)
        return drafts

    def _assign(self, texts: dict[int, np.ndarray]) -> None:
        """Assigns each slot the request that its text continues, or starts a new request in an unused object."""
        unassigned = list(self._requests)
        assigned: dict[int, _Request] = {}
        for slot, text_T in texts.items():
            previous = self._slots.get(slot)
            if previous in unassigned and previous.is_continued_by(text_T):
                assigned[slot] = previous
                unassigned.remove(previous)
        for slot, text_T in texts.items():
            moved = [one for one in unassigned if slot not in assigned and one.is_continued_by(text_T)]
            if moved:
                assigned[slot] = max(moved, key=lambda one: len(one.text_T))
                unassigned.remove(assigned[slot])
        for slot, text_T in texts.items():
            if slot not in assigned:
                # Reuses the request unassigned for longest: its drafter may remember the text that it wrote.
                assigned[slot] = unassigned.pop(0) if unassigned else _Request(copy.copy(self._drafter))
                assigned[slot].begin(text_T, self._session(text_T.tolist()))
        self._requests = [*unassigned, *assigned.values()]
        self._slots = assigned

    def _session(self, row: list[int]) -> Session:
        return Session(
            target=self._target,
            rows=[row],
            cache=KVCache(num_layers=0, batch_size=1),
            sampling=Sampling(temperature=0),
            generator=torch.Generator().manual_seed(0),
        )


class _Request:
    """One request: its known text, its drafter and its latest draft."""

    def __init__(self, drafter: Any) -> None:
        self._drafter = drafter
        self.text_T = np.zeros(0, dtype=np.int64)

    def begin(self, text_T: np.ndarray, session: Session) -> None:
        """Starts the drafter on a new text."""
        self._session, self.text_T = session, text_T.copy()
        self._draft: Draft | None = None
        self._controlled = with_length_control(self._drafter, "auto")
        self._controlled.start(session)

    def is_continued_by(self, text_T: np.ndarray) -> bool:
        """Returns whether the request's text is a proper prefix of `text_T`."""
        length = len(self.text_T)
        return (
            length < len(text_T)
            and text_T[length - 1] == self.text_T[-1]
            and np.array_equal(text_T[:length], self.text_T)
        )

    def draft(self, text_T: np.ndarray, room: int, cost_ms: float) -> list[int]:
        """Updates the drafter with the new tokens of the text and returns a draft of at most `room` tokens."""
        new = text_T[len(self.text_T) :].tolist()
        self._session.rows[0] += new
        self.text_T = text_T.copy()
        if new and self._draft is not None and not self._drafter.hidden_layers:
            self._controlled.observe(_step(self._draft, new, cost_ms))
        draft = self._draft = self._controlled.propose(room)
        return [int(draft.tokens_BN[0, node]) for node in _first_path(draft)[1 : room + 1]]


def _is_token_only(family: str) -> bool:
    """Returns whether the family is exported for this class."""
    return getattr(writers(family).get("vllm"), "__module__", None) == tokens.__name__


def _first_path(draft: Draft) -> list[int]:
    """Returns the nodes of the path of first children from node 0, which are a drafter's most likely tokens."""
    num_nodes = draft.num_nodes[0] if draft.num_nodes is not None else draft.tree.num_nodes
    parents, path = draft.tree.parents_RN[0, :num_nodes].tolist(), [0]
    while path[-1] in parents:
        path.append(parents.index(path[-1]))
    return path


def _step(draft: Draft, new: list[int], cost_ms: float) -> Step:
    """Returns the verification step of a draft, inferred from the `new` tokens; its logits [1, N, 0] are empty.

    The last new token is the target's own; those before it are accepted draft tokens.
    """
    drafted, path = draft.tokens_BN[0].tolist(), _first_path(draft)
    num_accepted = 0
    while num_accepted < min(len(path), len(new)) - 1 and drafted[path[num_accepted + 1]] == new[num_accepted]:
        num_accepted += 1
    accepted = path[: num_accepted + 1]
    device = draft.tokens_BN.device
    padded = accepted + accepted[-1:] * (draft.tree.depth + 1 - len(accepted))
    verdict = Verdict(
        path_BP=torch.tensor([padded], device=device),
        num_accepted_B=torch.tensor([num_accepted], device=device),
        next_token_B=torch.tensor([new[-1]], device=device),
    )
    logits_BNV = torch.empty(1, draft.tree.num_nodes, 0, device=device)
    return Step(draft=draft, logits_BNV=logits_BNV, hidden={}, verdict=verdict, paths=[accepted], cost_ms=cost_ms)
