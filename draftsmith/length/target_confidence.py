"""A gate on any drafter: where the target itself is in doubt nothing is drafted.

After a correction that the target gave less than a threshold it goes on alone until a token of its own reaches the
threshold. Only whether to draft is decided, from what is committed already, so that the law stays the target's.

Shape suffixes: B rows, N nodes, V vocabulary.
"""

import torch

from draftsmith.core.drafter import Drafter, Session, Step
from draftsmith.core.tree import Draft
from draftsmith.length.controller import cut
from draftsmith.verify.paths import values_at, pick


class TargetConfidenceThreshold(Drafter):
    """A drafter whose rows draft nothing while their gate is shut.

    Confidence is the softmax of the target's logits, before temperature, top-k and top-p: these sharpen a law without
    making the target any surer.
    """

    def __init__(self, drafter: Drafter, threshold: float = 0.5) -> None:
        if not 0 < threshold < 1:
            raise ValueError(f"a gate of {threshold:g} is no threshold; it must lie between 0 and 1")
        self.config, self.target, self.hidden_layers = drafter.config, drafter.target, drafter.hidden_layers
        self.threshold = threshold
        self._drafter = drafter

    def start(self, session: Session) -> None:
        self._session = session
        self._is_shut = [False] * len(session.rows)
        self._drafter.start(session)

    def propose(self, budget: int) -> Draft:
        if all(self._is_shut):
            return self._session.empty_draft()
        return cut(self._drafter.propose(budget), [0 if shut else budget for shut in self._is_shut])

    def observe(self, step: Step) -> None:
        draft, ends_B = step.draft, pick(step.verdict.path_BP, step.verdict.num_accepted_B)
        chosen_B = pick(values_at(step.logits_BNV, ends_B).float().softmax(-1), step.verdict.next_token_B)
        is_child_BN = (draft.tree.parents_RN == ends_B[:, None]).expand_as(draft.tokens_BN)
        if (valid_BN := draft.valid_BN()) is not None:
            is_child_BN = is_child_BN & valid_BN
        told = torch.stack([chosen_B, is_child_BN.any(1).float()], dim=1).tolist()
        for row, (chosen, has_rejected) in enumerate(told):
            is_doubtful = chosen < self.threshold and (self._is_shut[row] or has_rejected > 0)
            # What a finished row would draft is not needed.
            self._is_shut[row] = is_doubtful or not step.paths[row]
        self._drafter.observe(step)
