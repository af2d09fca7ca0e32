"""The target and draft distributions along a tree that remain after each rejected child; rows advance independently.

After any number of steps max(target - draft, 0), with rescaling in between, the remaining target distribution is
proportional to max(target - c draft, 0): rejections are stored as one number c per text, and whole distributions are
only needed for their sums. The choice of nodes is made on the host, where a step costs less than on tiny tensors.

Shape suffixes: B rows, N nodes, V vocabulary; X a subset of the rows.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from draftsmith.core.tree import Draft
from draftsmith.verify.paths import Siblings

Array = np.ndarray[Any, Any]
TINY = float(np.finfo(np.float64).tiny)


class Rejections:
    """The untried children of each text and the distributions to test them by; a text is named by its first node."""

    def __init__(self, target_probs_BNV: Tensor, draft: Draft) -> None:
        assert draft.draft_probs_BNV is not None
        self._target_BNV = target_probs_BNV
        self._draft_BNV = draft.draft_probs_BNV.to(target_probs_BNV.dtype)
        self._with_replacement = draft.sampling_scheme == "independent"
        siblings = Siblings(draft)
        self.first_BN, self.above_BN, self._is_untried_BN, self._tokens_BN = (
            tensor.cpu().numpy().copy()
            for tensor in (siblings.first_BN, siblings.above_BN, siblings.is_child_BN, draft.tokens_BN)
        )
        self.rows_B = np.arange(len(self._tokens_BN))
        self._target_of_token_BN, self._draft_of_token_BN = (
            siblings.token_probs(probs_BNV).double().cpu().numpy() for probs_BNV in (self._target_BNV, self._draft_BNV)
        )
        self._c_BN = np.zeros(self._tokens_BN.shape)
        self._mass_BN, self._draft_mass_BN = np.ones_like(self._c_BN), np.ones_like(self._c_BN)
        self._is_rejected_BN = np.zeros(self._tokens_BN.shape, dtype=bool)
        # Allocating these in each call would take longer than the arithmetic.
        num_rows, _, vocab_size = target_probs_BNV.shape
        self._target_BV, self._draft_BV = (target_probs_BNV.new_empty(num_rows, vocab_size) for _ in range(2))

    def next(self, X: Array, text_X: Array) -> tuple[Array, Array]:
        """Returns the first untried child [X] of each text (node 0 if none), and a mask of the texts that have one."""
        is_child_XN = self._is_untried_BN[X] & (self.above_BN[X] == text_X[:, None])
        return is_child_XN.argmax(1), is_child_XN.any(1)

    def ratio(self, X: Array, child_X: Array) -> Array:
        """Returns target(x) / draft(x) [X] of untried children, by the remaining distributions."""
        index = X, self.above_BN[X, child_X]
        draft_X = self._draft_of_token_BN[X, child_X]
        target_X = np.maximum(self._target_of_token_BN[X, child_X] - self._c_BN[index] * draft_X, 0)
        return target_X / np.maximum(self._mass_BN[index], TINY) * self._draft_mass_BN[index] / draft_X

    def reject(self, X: Array, child_X: Array, weight_X: Array) -> Array:
        """Sets target to max(weight target - draft, 0) and, without replacement, draft(x) to 0; both normalised.

        Returns the sum [X] of the former before it is normalised. Weights must be above 0.
        """
        if not len(X):
            return np.zeros(0)
        text_X = self.above_BN[X, child_X]
        index, before_X = (X, text_X), self._mass_BN[X, text_X]
        self._is_untried_BN[X, child_X] = False
        self._c_BN[index] += before_X / (weight_X * self._draft_mass_BN[index])
        target_XV, draft_XV = self._remaining(X, text_X)
        self._mass_BN[index] = target_XV.sum(-1).double().cpu().numpy()
        if not self._with_replacement:
            # The target has no mass left at rejected tokens: they are removed from the draft's distribution only.
            self._is_rejected_BN[X, child_X] = True
            row, node = np.nonzero(self._is_rejected_BN[X] & (self.above_BN[X] == text_X[:, None]))
            draft_XV[torch.from_numpy(row), torch.from_numpy(self._tokens_BN[X[row], node])] = 0.0
            self._draft_mass_BN[index] = np.maximum(draft_XV.sum(-1).double().cpu().numpy(), TINY)
        return weight_X * self._mass_BN[index] / np.maximum(before_X, TINY)

    def drop(self, X: Array, child_X: Array) -> None:
        """Removes children whose parents' distributions are not needed any more."""
        self._is_untried_BN[X, child_X] = False

    def target_probs(self, text_B: Array) -> Tensor:
        """Returns the target's remaining probabilities [B, V] after each row's text, not normalised."""
        return self._remaining(self.rows_B, text_B)[0]

    def _remaining(self, X: Array, text_X: Array) -> tuple[Tensor, Tensor]:
        """Returns the target's remaining and the draft's probabilities [X, V], in memory that the next call reuses."""
        device, dtype = self._target_BNV.device, self._target_BNV.dtype
        gathered = []
        for probs_BNV, memory_BV in ((self._target_BNV, self._target_BV), (self._draft_BNV, self._draft_BV)):
            # Nodes past the last draft distribution have no children: nothing is subtracted there.
            index_X = torch.from_numpy(X * probs_BNV.shape[1] + np.minimum(text_X, probs_BNV.shape[1] - 1)).to(device)
            gathered.append(torch.index_select(probs_BNV.flatten(0, 1), 0, index_X, out=memory_BV[: len(X)]))
        target_XV, draft_XV = gathered
        c_X1 = torch.from_numpy(self._c_BN[X, text_X]).to(device, dtype)[:, None]
        target_XV.addcmul_(draft_XV, c_X1, value=-1).clamp_(min=0)
        return target_XV, draft_XV
