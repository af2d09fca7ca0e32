"""Online training of a draft model at the positions where the target rejected its tokens (2310.07177).

Verification has computed the target's logits there, so that the target is not run again. Weights change between calls
of `generate` only, so that the verifier gets the distribution that tokens were sampled from.

Shape suffixes: B rows, T positions, R rejections, K most likely tokens kept, V vocabulary.
"""

import importlib
import pkgutil
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import draftsmith
import trainers
from data.batches import Example, collate
from data.shards import write_atomically
from data.teacher import complete
from draftsmith.artifacts.families import name_of
from draftsmith.core.drafter import Drafter, Session, Step
from draftsmith.core.tree import Draft
from draftsmith.parts.checks import check_at_least, check_positive
from draftsmith.parts.neural.former_names import current_name
from trainers.parts import distillation
from trainers.parts.losses import DIVERGENCES


@dataclass(frozen=True, kw_only=True)
class OnlineSettings:
    """Frequency of gradient steps, their data and their loss."""

    every: int = 8
    """Number of requests (rows) between gradient steps."""
    learning_rate: float = 1e-3
    """Constant learning rate of AdamW."""
    kept: int = 64
    """Largest number of requests kept for training; the oldest are dropped."""
    top_k: int = 64
    """Number of the target's largest logits kept at each rejection, all other tokens being one outcome; 0 keeps all."""
    loss: str = field(default="forward_kl", metadata={"choices": list(DIVERGENCES)})
    """Divergence from the target's distribution at rejections."""
    clip: float = 1.0
    """Largest norm of the gradient."""

    def __post_init__(self) -> None:
        check_at_least(self, 1, "every", "kept")
        if self.every > self.kept:
            raise ValueError(f"every is {self.every} and kept is {self.kept}; kept must be at least as large")
        check_at_least(self, 0, "top_k")
        check_at_least(self, 0, "learning_rate", most=1e6)
        check_positive(self, "clip")


@dataclass(frozen=True, kw_only=True, eq=False)
class _Rejections:
    """Positions before the tokens that the target rejected in one request, and its logits there."""

    positions: list[int] = field(default_factory=list)
    top_logits: list[Tensor] = field(default_factory=list)
    top_ids: list[Tensor] = field(default_factory=list)
    normalisers: list[Tensor] = field(default_factory=list)


class Online(Drafter):
    """A drafter that wraps a trainable one and trains it between calls of `generate`."""

    def __init__(self, drafter: Any, settings: OnlineSettings | None = None) -> None:
        """Raises ValueError for a drafter that no trainer distils."""
        self.settings = settings or OnlineSettings()
        self.drafter, self.config, self.target = drafter, drafter.config, drafter.target
        self.hidden_layers: tuple[int, ...] = drafter.hidden_layers
        self.policy = drafter.policy
        self._trainer = trainer_of(drafter)
        self._num_kept = min(self.settings.top_k or self.target.vocab_size, self.target.vocab_size)
        self._loss = self._trainer.Settings(loss=self.settings.loss, teacher_top_k=self._num_kept)
        self._initial = {name: weight.clone() for name, weight in drafter.state_dict().items()}
        drafter.requires_grad_()
        self._session: Session | None = None
        self._draft: Draft | None = None
        self._reset()

    # Drafting

    def start(self, session: Session) -> None:
        self._collect_requests()
        if self._num_new >= self.settings.every:
            self.learn()
        self._session = session
        self._rejections = [_Rejections() for _ in session.rows]
        self.drafter.start(session)

    def propose(self, budget: int) -> Draft:
        assert self._session is not None
        self._draft = self.drafter.propose(budget)
        self._lengths = [len(row) for row in self._session.rows]
        return self._draft

    def observe(self, step: Step) -> None:
        if step.is_for(self._draft):
            self._record_rejections(step)
        self.drafter.observe(step)

    # Training

    @torch.inference_mode(False)
    @torch.enable_grad()
    def learn(self) -> float | None:
        """Takes one gradient step at the rejections since the last step and returns the mean loss.

        Must be called between calls of `generate`, which itself takes a step after `every` requests. Returns None and
        does nothing if nothing was rejected.
        """
        self._collect_requests()
        requests, self._num_new = list(self._requests), 0
        self._requests.clear()
        if not requests:
            return None
        batch = collate(requests)
        needs = self._trainer.needs(self._loss, self.target)
        batch = complete(batch, self.target, needs.layers, needs.top_k)
        total, _ = self._trainer.loss(self.drafter, batch, self._loss, self.target)
        mean = total / int(batch.loss_mask_BT.sum())
        self._optimiser.zero_grad()
        mean.backward()
        nn.utils.clip_grad_norm_(self.drafter.parameters(), self.settings.clip)
        self._optimiser.step()
        self._optimiser.zero_grad()
        self.num_steps += 1
        return mean.item()

    @torch.inference_mode(False)
    def forget(self) -> None:
        """Restores the initial weights and drops requests and optimiser state."""
        self.drafter.load_state_dict(self._initial)
        self._reset()

    def save(self, folder: Path, record: dict[str, Any] | None = None) -> None:
        """Saves the wrapped drafter as an artifact, with `record` added to its manifest."""
        draftsmith.save(self.drafter, folder, target=self.target, record=record)

    def save_optimizer(self, path: Path) -> None:
        """Writes the optimiser's state, which continues training once all requests have been used."""
        state = {
            f"{name}.{part}": value
            for name, weight in self.drafter.named_parameters()
            for part, value in self._optimiser.state[weight].items()
        }
        write_atomically(path, lambda temporary: save_file(state, temporary))

    def load_optimizer(self, path: Path) -> None:
        """Reads the state written by `save_optimizer` for the same weights."""
        for name, value in load_file(path).items():
            weight, _, part = name.rpartition(".")
            parameter = self.drafter.get_parameter(current_name(self.drafter, weight))
            self._optimiser.state[parameter][part] = value

    def _reset(self) -> None:
        self._optimiser = torch.optim.AdamW(self.drafter.parameters(), lr=self.settings.learning_rate, weight_decay=0)
        self._requests: deque[Example] = deque(maxlen=self.settings.kept)
        self._session = self._draft = None
        self._num_new = self.num_steps = 0

    def _record_rejections(self, step: Step) -> None:
        """Keeps the target's logits at the last accepted node of rows with a rejected child."""
        rejected = [row for row, path in enumerate(step.paths) if path and _has_children(step.draft, row, path[-1])]
        if not rejected:
            return
        logits_RV = step.logits_BNV[rejected, [step.paths[row][-1] for row in rejected]].float()
        top, normaliser_R = logits_RV.topk(self._num_kept, dim=-1), logits_RV.logsumexp(-1)
        # Tensors made in inference mode cannot be used in training.
        with torch.inference_mode(False):
            values_RK, ids_RK, normaliser_R = top.values.clone(), top.indices.clone(), normaliser_R.clone()
        for at, row in enumerate(rejected):
            rejections = self._rejections[row]
            rejections.positions.append(self._lengths[row] + len(step.paths[row]) - 2)
            rejections.top_logits.append(values_RK[at])
            rejections.top_ids.append(ids_RK[at])
            rejections.normalisers.append(normaliser_R[at])

    def _collect_requests(self) -> None:
        """Turns the rows of the last call, which is finished, into training rows."""
        session, self._session = self._session, None
        if session is None:
            return
        self._num_new += len(session.rows)
        for row, (ids, rejections) in enumerate(zip(session.rows, self._rejections, strict=True)):
            # A row that ended within its path is shorter than what was accepted.
            inside = [at for at, position in enumerate(rejections.positions) if position + 1 < len(ids)]
            if inside:
                with torch.inference_mode(False):
                    self._requests.append(_example(ids, rejections, inside, _source(session, row)))


def trainer_of(drafter: Any) -> ModuleType:
    """Returns the trainer that distils drafters of this family; raises ValueError if there is none."""
    for info in pkgutil.iter_modules(trainers.__path__):
        if info.ispkg:
            continue
        module = importlib.import_module(f"trainers.{info.name}")
        is_distilled = issubclass(getattr(module, "Settings", object), distillation.LossSettings)
        if is_distilled and getattr(module, "Drafter", None) is type(drafter):
            return module
    raise ValueError(f"a drafter of the family {name_of(drafter)} cannot be trained online: no trainer distils it")


def _has_children(draft: Draft, row: int, node: int) -> bool:
    """Returns True if a node of the row has children, which were rejected if the node is the last one accepted."""
    used = draft.tree.num_nodes if draft.num_nodes is None else draft.num_nodes[row]
    parents_RN = draft.tree.parents_RN
    return bool((parents_RN[row % len(parents_RN), :used] == node).any())


def _example(ids: list[int], rejections: _Rejections, inside: list[int], source_S: Tensor | None) -> Example:
    """Returns the request as a row in which the tokens after rejections are supervised."""
    positions = [rejections.positions[at] for at in inside]
    tokens_T = torch.tensor(ids)
    mask_T = torch.zeros(len(ids), dtype=torch.bool)
    mask_T[[position + 1 for position in positions]] = True

    def spread(values: list[Tensor]) -> Tensor:
        values_R = torch.stack([values[at] for at in inside]).cpu()
        out_T = values_R.new_zeros(len(ids), *values_R.shape[1:])
        out_T[positions] = values_R
        return out_T

    return Example(
        tokens_T=tokens_T,
        loss_mask_T=mask_T,
        key="served",
        source_S=source_S,
        top_logits_TK=spread(rejections.top_logits),
        top_ids_TK=spread(rejections.top_ids),
        log_normaliser_T=spread(rejections.normalisers),
    )


def _source(session: Session, row: int) -> Tensor | None:
    source = session.source
    return None if source is None else source.tokens_BT[row][source.mask_BT[row].bool()].clone().cpu()
