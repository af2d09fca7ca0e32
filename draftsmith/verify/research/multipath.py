"""Several independent paths: the best-looking one is chosen, then judged as a block (after 2602.16961).

How the path is chosen is our own; what follows is block verification (2403.10444) with the law of the chosen token.

Shape suffixes: B rows, N nodes, V vocabulary.
"""

import torch
from torch import Tensor

from draftsmith.core.tree import Draft, Verdict
from draftsmith.verify.paths import Siblings, at, drawn_at, pick

LOSSLESS = True
SCHEMES = ("independent",)
OCTAVES, PER_OCTAVE = 16, 16


def verify(target_probs_BNV: Tensor, draft: Draft, uniforms_BU: Tensor) -> Verdict:
    """Goes down, of k children to the one of the best grade, the first of such, and judges that path as a block.

    A token's grade is log2(target(x) / draft(x)) in sixteenths: grades need no sort. With F(g) the draft's mass up to
    grade g, the best of k drawn tokens follows chosen(x) = (F(g)^k - F(g - 1)^k) draft(x) / (F(g) - F(g - 1)), which
    takes the draft's place in the ratios and residuals of `block`.
    """
    assert draft.draft_probs_BNV is not None
    siblings = Siblings(draft)
    rows_B1 = torch.arange(len(draft.tokens_BN), device=draft.tokens_BN.device)[:, None]
    node_B = torch.zeros_like(draft.tokens_BN[:, 0])
    end_B, weight_B = node_B, torch.ones_like(target_probs_BNV[:, 0, 0])
    next_probs_BV = target_probs_BNV[:, 0]
    while True:
        is_child_BN = siblings.of(node_B)
        num_children_B = is_child_BN.sum(1)
        target_BV = at(target_probs_BNV, node_B)
        draft_BV = at(draft.draft_probs_BNV, node_B).to(target_BV.dtype)
        chosen_BV, grade_BV = law_of_best(target_BV, draft_BV, num_children_B)
        left_BV = (weight_B[:, None] * target_BV - chosen_BV).clamp_(min=0)
        left_B = left_BV.sum(-1)
        rest_B = left_B + 1 - weight_B
        has_children_B = num_children_B > 0
        chance_B = torch.where(has_children_B, torch.where(rest_B > 0, left_B / rest_B, 1.0), weight_B)
        uniform_B = uniforms_BU.gather(1, node_B[:, None])[:, 0]
        passes_B = (uniform_B < chance_B) | (node_B == 0)
        end_B = torch.where(passes_B, node_B, end_B)
        after_BV = torch.where(has_children_B[:, None], left_BV, target_BV)
        next_probs_BV = torch.where(passes_B[:, None], after_BV, next_probs_BV)
        if not has_children_B.any():
            break
        grade_BN = grade_BV[rows_B1, draft.tokens_BN].masked_fill(~is_child_BN, -1)
        # Of equal grades the first: argmax alone would promise nothing.
        order_N = torch.arange(draft.tree.num_nodes, device=grade_BN.device)
        child_B = (grade_BN * len(order_N) - order_N).argmax(1)
        token_B = pick(draft.tokens_BN, child_B)
        ratio_B = pick(target_BV, token_B) / pick(chosen_BV, token_B)
        weight_B = torch.where(has_children_B, (weight_B * ratio_B).clamp(max=1), weight_B)
        node_B = torch.where(has_children_B, pick(siblings.first_BN, child_B), node_B)
    return drawn_at(end_B, next_probs_BV, target_probs_BNV, uniforms_BU[:, -1], draft)


def law_of_best(target_BV: Tensor, draft_BV: Tensor, num_drawn_B: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the law [B, V] of the best-graded one of so many tokens drawn from the draft's law, and the grades.

    Running sums are in float64: their powers differ by less than float32 can tell.
    """
    ratio_BV = (target_BV / draft_BV).log2_().mul_(PER_OCTAVE)
    # Neither law having a token leaves no number; no such token is drawn.
    grade_BV = ratio_BV.nan_to_num_(nan=0.0).clamp_(-OCTAVES * PER_OCTAVE, OCTAVES * PER_OCTAVE).round_().long()
    grade_BV += OCTAVES * PER_OCTAVE
    mass_BG = draft_BV.new_zeros(len(draft_BV), 2 * OCTAVES * PER_OCTAVE + 1).scatter_add_(1, grade_BV, draft_BV)
    running_BG = mass_BG.double().cumsum(-1)
    power_BG = (running_BG / running_BG[:, -1:]) ** num_drawn_B[:, None]
    chance_BG = power_BG - torch.nn.functional.pad(power_BG[:, :-1], (1, 0))
    # Within a grade the first one drawn is taken, which follows the draft's law.
    factor_BG = torch.where(mass_BG > 0, chance_BG / mass_BG, 0.0).to(draft_BV.dtype)
    return factor_BG.gather(1, grade_BV).mul_(draft_BV), grade_BV
