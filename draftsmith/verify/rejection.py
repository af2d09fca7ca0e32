"""What is left of the laws along a tree as child after child is rejected, for rows that go at their own pace.

However often max(target - draft, 0) is taken, whatever it is scaled by in between, the target's law stays proportional
to max(target - c draft, 0): rejections are kept as one number a text, and only their sums ask for whole laws. Which
node is looked at where is settled on the host, where a step costs less than on tensors of a few numbers.

Shape suffixes: B rows, N nodes, V vocabulary; X some of the rows.
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
    """The children that are left to be tried, and the laws by which they are judged; a node stands for its text."""

    def __init__(self, target_probs_BNV: Tensor, draft: Draft) -> None:
        assert draft.draft_probs_BNV is not None
        self._target_BNV = target_probs_BNV
        self._draft_BNV = draft.draft_probs_BNV.to(target_probs_BNV.dtype)
        self._is_replaced = draft.sampling_scheme == "independent"
        siblings = Siblings(draft)
        self.first_BN, self.above_BN, self._is_left_BN, self._tokens_BN = (
            tensor.cpu().numpy().copy()
            for tensor in (siblings.first_BN, siblings.above_BN, siblings.is_child_BN, draft.tokens_BN)
        )
        self.rows_B = np.arange(len(self._tokens_BN))
        self._wanted_BN, self._given_BN = (
            siblings.chances(probs_BNV).double().cpu().numpy() for probs_BNV in (self._target_BNV, self._draft_BNV)
        )
        self._c_BN = np.zeros(self._tokens_BN.shape)
        self._mass_BN, self._draft_mass_BN = np.ones_like(self._c_BN), np.ones_like(self._c_BN)
        self._is_rejected_BN = np.zeros(self._tokens_BN.shape, dtype=bool)
        # Memory taken anew costs more than the arithmetic done in it.
        num_rows, _, vocab_size = target_probs_BNV.shape
        self._left_BV, self._drafted_BV = (target_probs_BNV.new_empty(num_rows, vocab_size) for _ in range(2))

    def next(self, X: Array, text_X: Array) -> tuple[Array, Array]:
        """Returns the first child of each text that is left (else node 0), and whether there is one [X]."""
        is_child_XN = self._is_left_BN[X] & (self.above_BN[X] == text_X[:, None])
        return is_child_XN.argmax(1), is_child_XN.any(1)

    def ratio(self, X: Array, child_X: Array) -> Array:
        """Returns target(x) / draft(x) [X] of children that are left, by the laws as they stand."""
        place = X, self.above_BN[X, child_X]
        given_X = self._given_BN[X, child_X]
        wanted_X = np.maximum(self._wanted_BN[X, child_X] - self._c_BN[place] * given_X, 0)
        return wanted_X / np.maximum(self._mass_BN[place], TINY) * self._draft_mass_BN[place] / given_X

    def reject(self, X: Array, child_X: Array, weight_X: Array) -> Array:
        """Makes the target's law max(weight target - draft, 0) and, without replacement, draft(x) 0; both normalised.

        Returns the mass [X] of the former before it was. Weights must be above 0.
        """
        if not len(X):
            return np.zeros(0)
        text_X = self.above_BN[X, child_X]
        place, before_X = (X, text_X), self._mass_BN[X, text_X]
        self._is_left_BN[X, child_X] = False
        self._c_BN[place] += before_X / (weight_X * self._draft_mass_BN[place])
        left_XV, drafted_XV = self._laws(X, text_X)
        self._mass_BN[place] = left_XV.sum(-1).double().cpu().numpy()
        if not self._is_replaced:
            # Of what is rejected nothing is left in the target's law: only the draft's has to lose it.
            self._is_rejected_BN[X, child_X] = True
            row, node = np.nonzero(self._is_rejected_BN[X] & (self.above_BN[X] == text_X[:, None]))
            drafted_XV[torch.from_numpy(row), torch.from_numpy(self._tokens_BN[X[row], node])] = 0.0
            self._draft_mass_BN[place] = np.maximum(drafted_XV.sum(-1).double().cpu().numpy(), TINY)
        return weight_X * self._mass_BN[place] / np.maximum(before_X, TINY)

    def drop(self, X: Array, child_X: Array) -> None:
        """Takes children away without a look at the laws, which nothing depends on any more."""
        self._is_left_BN[X, child_X] = False

    def probs(self, text_B: Array) -> Tensor:
        """Returns the target's law [B, V] as it stands after each row's text, not normalised."""
        return self._laws(self.rows_B, text_B)[0]

    def _laws(self, X: Array, text_X: Array) -> tuple[Tensor, Tensor]:
        """Returns what is left of the target's law and of the draft's [X, V], in memory that the next call reuses."""
        device, dtype = self._target_BNV.device, self._target_BNV.dtype
        laws = []
        for probs_BNV, memory_BV in ((self._target_BNV, self._left_BV), (self._draft_BNV, self._drafted_BV)):
            # Nodes past the last draft law have no children: nothing of it is taken there.
            place_X = torch.from_numpy(X * probs_BNV.shape[1] + np.minimum(text_X, probs_BNV.shape[1] - 1)).to(device)
            rows_XV = probs_BNV.flatten(0, 1)
            laws.append(torch.index_select(rows_XV, 0, place_X, out=memory_BV[: len(X)]))
        left_XV, drafted_XV = laws
        c_X1 = torch.from_numpy(self._c_BN[X, text_X]).to(device, dtype)[:, None]
        left_XV.addcmul_(drafted_XV, c_X1, value=-1).clamp_(min=0)
        return left_XV, drafted_XV
