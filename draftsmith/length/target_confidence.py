"""Skips drafting while the target's confidence in its own tokens is below a threshold.

After a rejection whose correction has a target probability below the threshold, a row drafts nothing until the target
reaches the threshold with a token of its own. Only whether to draft is decided, from committed tokens, so that decoding
stays lossless.

Shape suffixes: B rows, N nodes, V vocabulary.
"""

import torch

from draftsmith.core.drafter import Drafter, Session, Step
from draftsmith.core.rows import followed
from draftsmith.core.tree import Draft
from draftsmith.length.controller import cut
from draftsmith.verify.paths import pick, values_at


class TargetConfidenceThreshold(Drafter):
    """A drafter that skips drafting for rows where the target's confidence is below a threshold.

    Confidence is the softmax of the target's logits before temperature, top-k and top-p, which sharpen a distribution
    without making the target more certain.
    """

    def __init__(self, drafter: Drafter, threshold: float = 0.5) -> None:
        if not 0 < threshold < 1:
            raise ValueError(f"the target's confidence threshold is {threshold:g}; it must lie between 0 and 1")
        self.config, self.target, self.hidden_layers = drafter.config, drafter.target, drafter.hidden_layers
        self.threshold = threshold
        self._drafter = drafter

    def start(self, session: Session) -> None:
        self._session = session
        self._is_skipping = [False] * len(session.rows)
        self._drafter.start(session)

    def change_rows(self, origins: list[int | None], new: Session | None) -> bool:
        self._is_skipping = followed(origins, self._is_skipping, [False] * len(origins))
        return self._drafter.change_rows(origins, new)

    def propose(self, budget: int) -> Draft:
        if all(self._is_skipping):
            return self._session.empty_draft()
        return cut(self._drafter.propose(budget), [0 if skips else budget for skips in self._is_skipping])

    def observe(self, step: Step) -> None:
        draft, ends_B = step.draft, pick(step.verdict.path_BP, step.verdict.num_accepted_B)
        confidence_B = pick(values_at(step.logits_BNV, ends_B).float().softmax(-1), step.verdict.next_token_B)
        is_child_BN = (draft.tree.parents_RN == ends_B[:, None]).expand_as(draft.tokens_BN)
        if (valid_BN := draft.valid_BN()) is not None:
            is_child_BN = is_child_BN & valid_BN
        found = torch.stack([confidence_B, is_child_BN.any(1).float()], dim=1).tolist()
        for row, (confidence, has_rejected) in enumerate(found):
            is_uncertain = confidence < self.threshold and (self._is_skipping[row] or has_rejected > 0)
            # Finished rows skip too: their drafts are not needed.
            self._is_skipping[row] = is_uncertain or not step.paths[row]
        self._drafter.observe(step)
