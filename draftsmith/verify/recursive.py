"""Sampled trees, level by level: recursive rejection, as SpecInfer (2305.09781) and EAGLE (2401.15077) do it.

Shape suffixes: B rows, N nodes, V vocabulary.
"""

import torch
from torch import Tensor

from draftsmith.tree import Draft
from draftsmith.verify.verdict import Siblings, Verdict, at, drawn_at, pick

LOSSLESS = True
DRAWN = ("independent", "without_replacement")


def verify(target_probs_BNV: Tensor, draft: Draft, uniforms_BU: Tensor) -> Verdict:
    """Tries the children of the last accepted node in turn: child x passes with probability min(1, target(x)/draft(x)).

    A rejection leaves norm(max(target - draft, 0)) as the target's law for the next sibling, and siblings drawn without
    replacement a draft law with no chance of x. With no child left the next token follows the law that remains.
    """
    assert draft.draft_probs_BNV is not None
    siblings = Siblings(draft)
    end_B = torch.zeros_like(draft.tokens_BN[:, 0])
    law_BV, mass_B = target_probs_BNV[:, 0].clone(), torch.ones_like(target_probs_BNV[:, 0, 0])
    taken_BV = at(draft.draft_probs_BNV, end_B).to(law_BV.dtype)
    while True:
        child_B, token_B, is_there_B = siblings.next(end_B)
        if not is_there_B.any():
            break
        siblings.remove(child_B, is_there_B)
        drafted_B, wanted_B = pick(taken_BV, token_B), pick(law_BV, token_B)
        uniform_B = uniforms_BU.gather(1, child_B[:, None])[:, 0]
        # law_BV sums to mass_B, and taken_BV to one.
        passes_B = is_there_B & (uniform_B * drafted_B * mass_B < wanted_B)
        fails_B = is_there_B & ~passes_B
        law_BV = torch.addcmul(law_BV, taken_BV, (mass_B * fails_B)[:, None], value=-1).clamp_(min=0)
        mass_B = torch.where(fails_B, law_BV.sum(-1), mass_B)
        if draft.drawn == "without_replacement":
            taken_BV.scatter_(1, token_B[:, None], torch.where(fails_B, 0.0, drafted_B)[:, None])
            taken_BV /= torch.where(fails_B, taken_BV.sum(-1), 1.0).clamp(min=torch.finfo(law_BV.dtype).tiny)[:, None]
        if passes_B.any():
            end_B = torch.where(passes_B, siblings.first_BN.gather(1, child_B[:, None])[:, 0], end_B)
            law_BV[passes_B] = at(target_probs_BNV, end_B)[passes_B]
            taken_BV[passes_B] = at(draft.draft_probs_BNV, end_B)[passes_B].to(law_BV.dtype)
            mass_B = torch.where(passes_B, 1.0, mass_B)
    return drawn_at(end_B, law_BV, at(target_probs_BNV, end_B), uniforms_BU[:, -1], draft)
