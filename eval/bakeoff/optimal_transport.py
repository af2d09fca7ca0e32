"""The optimal-transport bound on the acceptance rate of first tokens, which every verifier can be compared with.

Shape suffixes: B rows, N nodes, V vocabulary; `...` any leading dimensions.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import draftsmith
from draftsmith.core.drafter import Drafter, Session, Step
from draftsmith.core.sampling import Sampling
from draftsmith.core.tree import Draft
from draftsmith.inputs.batching import eos_ids
from draftsmith.inputs.generation_config import make_rules, read_config, with_sampling

MIN_DRAFTS, MAX_REPEATS = 1000, 8


def optimal_acceptance(target_probs_V: Tensor, draft_probs_V: Tensor, num_drafts: Tensor | int) -> Tensor:
    """Returns the largest possible probability [...] of accepting one of `num_drafts` independently drawn tokens.

    1 + min_i [P(H_i) - Q(H_i)^k], where H_i are the i tokens with the largest ratio draft / target, and P and Q their
    probability under target and draft (2502.18779, theorem 4): the optimal transport between the target and k drafts.
    """
    ratio_V = torch.where(target_probs_V > 0, draft_probs_V / target_probs_V, torch.inf)
    order_V = ratio_V.argsort(dim=-1, descending=True)
    target_mass_V, draft_mass_V = (
        probs_V.gather(-1, order_V).double().cumsum(-1) for probs_V in (target_probs_V, draft_probs_V)
    )
    powers = torch.as_tensor(num_drafts, device=target_probs_V.device)[..., None]
    return 1 + (target_mass_V - draft_mass_V.clamp(max=1) ** powers).amin(-1).clamp(max=0)


class FirstTokenRecorder(Drafter):
    """Wraps a drafter and records the acceptance rate of its first tokens and the optimal-transport bound on it."""

    def __init__(self, drafter: Drafter, sampling: Sampling) -> None:
        self.config, self.target, self.hidden_layers = drafter.config, drafter.target, drafter.hidden_layers
        self._drafter, self._sampling = drafter, sampling
        self.num_steps, self.num_accepted, self.sum_of_bounds = 0, 0, 0.0

    def start(self, session: Session) -> None:
        self._drafter.start(session)

    def propose(self, budget: int) -> Draft:
        return self._drafter.propose(budget)

    def observe(self, step: Step) -> None:
        """Counts steps whose tokens at depth 1 were drawn independently; a single token always is."""
        draft, running = step.draft, [row for row, path in enumerate(step.paths) if path]
        num_first = int((draft.tree.depths_RN[0] == 1).sum())
        if draft.draft_probs_BNV is not None and (draft.sampling_scheme == "independent" or num_first == 1):
            target_BV, draft_BV = self._sampling.probs(step.logits_BNV[:, 0]), draft.draft_probs_BNV[:, 0]
            self.sum_of_bounds += float(optimal_acceptance(target_BV, draft_BV, num_first)[running].sum())
            self.num_accepted += int((step.verdict.num_accepted_B[running] > 0).sum())
            self.num_steps += len(running)
        self._drafter.observe(step)


def first_token_acceptance(
    drafter: Drafter, prompts: list[list[int]], *, verifier: str, seed: int, **settings: Any
) -> tuple[float, float] | None:
    """Returns the acceptance rate of drafts' first tokens under `verifier`, and its optimal-transport bound.

    Decodes `prompts` as one batch, repeatedly until `MIN_DRAFTS` drafts were verified; with that number the two may
    differ by 0.03 by chance. `settings` go to `draftsmith.generate`. Returns None if first tokens are not sampled.
    """
    rows = [torch.tensor(prompt, device=drafter.target.device) for prompt in prompts]
    config = read_config(drafter.target, settings.get("generation_config"))
    sampling = with_sampling(config, settings["temperature"], None, None)
    if config is not None:
        ids, eos = [[0]], eos_ids(drafter.target, config.eos_token_id)
        sampling = make_rules(drafter.target, config, sampling, ids, ids, max_new_tokens=1, eos=eos).sampling
    recorder = FirstTokenRecorder(drafter, sampling)
    for number in range(MAX_REPEATS):
        draftsmith.generate(
            drafter.target,
            pad_sequence(rows, batch_first=True),
            recorder,
            attention_mask=pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
            verifier=verifier,
            seed=seed + number,
            **settings,
        )
        if not recorder.num_steps:
            return None
        if recorder.num_steps >= MIN_DRAFTS:
            break
    return recorder.num_accepted / recorder.num_steps, recorder.sum_of_bounds / recorder.num_steps
