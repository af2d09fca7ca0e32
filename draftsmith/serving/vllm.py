"""Drafters that go by tokens alone inside vLLM, by its method `custom_class` (0.32 and 0.33).

vLLM shows such a class the tokens of every request, and neither hidden layers nor logits; it verifies chains, and takes
them for deterministic at any temperature. Each request has a drafter of its own, all with the same weights and stores.

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
    """What vLLM asks for drafts; lengths go by the artifact's own policy, up to num_speculative_tokens.

    A request is recognised by its tokens: vLLM tells no names, moves requests from slot to slot, and takes them out for
    a while. What became of a draft is read off the tokens that follow. Raises ValueError for an artifact that cannot be
    run so, or was made for another target.
    """

    def __init__(self, vllm_config: Any) -> None:
        path = os.environ.get(ARTIFACT_VARIABLE)
        if not path:
            raise ValueError(f"{ARTIFACT_VARIABLE} names no artifact; set it as launch.json of the export says")
        model = vllm_config.model_config
        self._num_draft = int(vllm_config.speculative_config.num_speculative_tokens)
        self._max_length = int(model.max_model_len)
        device = torch.device(vllm_config.device_config.device)
        # What its sizes are is known without weights: a wrong artifact shall not wait for them.
        self._target = cast(Target, TokenTarget(model.model, model.dtype, device))
        family = artifact.read_manifest(path)["family"]
        if not _goes_by_tokens(family):
            raise ValueError(
                f"artifact {path} is of family {family!r}, whose drafters go by hidden layers or change the target;"
                " vLLM shows tokens alone"
            )
        self._drafter = artifact.load(path, self._target)
        # Weights are laid out for single steps once, here, and not again for every request.
        self._drafter.start(self._session([0]))
        self._drafter.forget()
        self._requests: list[_Request] = []
        self._slots: dict[int, _Request] = {}
        self._last_s = time.perf_counter()

    def load_model(self, target_model: Any, *_: Any, **__: Any) -> None:
        """Does nothing: all was loaded when this was made."""

    @torch.inference_mode()
    def propose(
        self,
        sampled_token_ids: list[list[int]],
        num_tokens_no_spec: np.ndarray,
        token_ids_cpu: np.ndarray,
        slot_mappings: Any = None,
    ) -> list[list[int]]:
        """Returns a chain for each slot, empty where nothing was sampled or no room is left.

        `token_ids_cpu` [B, T] holds the tokens of each slot, `num_tokens_no_spec` [B] how many: those sampled now are
        the last.
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
        """Puts into each slot the request whose text has gone on there, or a new one in a place that is free."""
        free = list(self._requests)
        found: dict[int, _Request] = {}
        for slot, text_T in texts.items():
            held = self._slots.get(slot)
            if held in free and held.goes_on_as(text_T):
                found[slot] = held
                free.remove(held)
        for slot, text_T in texts.items():
            moved = [one for one in free if slot not in found and one.goes_on_as(text_T)]
            if moved:
                found[slot] = max(moved, key=lambda one: len(one.text_T))
                free.remove(found[slot])
        for slot, text_T in texts.items():
            if slot not in found:
                # The one that has waited longest: its drafter may remember what it wrote.
                found[slot] = free.pop(0) if free else _Request(copy.copy(self._drafter))
                found[slot].begin(text_T, self._session(text_T.tolist()))
        self._requests = [*free, *found.values()]
        self._slots = found

    def _session(self, row: list[int]) -> Session:
        return Session(
            target=self._target,
            rows=[row],
            cache=KVCache(num_layers=0, batch_size=1),
            sampling=Sampling(temperature=0),
            generator=torch.Generator().manual_seed(0),
        )


class _Request:
    """One request: its text as far as it was seen, its drafter, and the last draft."""

    def __init__(self, drafter: Any) -> None:
        self._drafter = drafter
        self.text_T = np.zeros(0, dtype=np.int64)

    def begin(self, text_T: np.ndarray, session: Session) -> None:
        """Starts anew with another text."""
        self._session, self.text_T = session, text_T.copy()
        self._draft: Draft | None = None
        self._controlled = with_length_control(self._drafter, "auto")
        self._controlled.start(session)

    def goes_on_as(self, text_T: np.ndarray) -> bool:
        """Returns whether its text is the beginning of this one."""
        length = len(self.text_T)
        return (
            length < len(text_T)
            and text_T[length - 1] == self.text_T[-1]
            and np.array_equal(text_T[:length], self.text_T)
        )

    def draft(self, text_T: np.ndarray, room: int, cost_ms: float) -> list[int]:
        """Returns what may follow a text, at most `room` tokens, once it has learnt what followed the last draft."""
        new = text_T[len(self.text_T) :].tolist()
        self._session.rows[0] += new
        self.text_T = text_T.copy()
        if new and self._draft is not None and not self._drafter.hidden_layers:
            self._controlled.observe(_step(self._draft, new, cost_ms))
        draft = self._draft = self._controlled.propose(room)
        return [int(draft.tokens_BN[0, node]) for node in _first_path(draft)[1 : room + 1]]


def _goes_by_tokens(family: str) -> bool:
    """Returns whether the family's drafters are exported for this class."""
    return getattr(writers(family).get("vllm"), "__module__", None) == tokens.__name__


def _first_path(draft: Draft) -> list[int]:
    """Returns the nodes from node 0 on, each the first child of the one before: a drafter's best."""
    num_nodes = draft.num_nodes[0] if draft.num_nodes is not None else draft.tree.num_nodes
    parents, path = draft.tree.parents_RN[0, :num_nodes].tolist(), [0]
    while path[-1] in parents:
        path.append(parents.index(path[-1]))
    return path


def _step(draft: Draft, new: list[int], cost_ms: float) -> Step:
    """Returns the step in which a draft was verified, told by the tokens that came of it; its logits [1, N, 0] are not.

    The last token is the target's own, and those before it were drafted.
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
