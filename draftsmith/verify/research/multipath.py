"""Multi-path block verification: chooses the best path of several independent ones (after 2602.16961).

The choice of the path is our own; it is then verified as a block (2403.10444) by the distribution of the chosen token.

Shape suffixes: B rows, N nodes, V vocabulary, G grades.
"""

import torch
from torch import Tensor

from draftsmith.core.tree import Draft, Verdict
from draftsmith.verify.paths import Siblings, pick, sample_next, values_at

LOSSLESS = True
SCHEMES = ("independent",)
OCTAVES, PER_OCTAVE = 16, 16


def verify(target_probs_BNV: Tensor, draft: Draft, uniforms_BU: Tensor) -> Verdict:
    """Descends to the child of the highest grade, the first of equals, and verifies that path as a block.

    A token's grade is log2(target(x) / draft(x)) rounded to sixteenths: grades need no sort. With F(g) the draft's mass
    up to grade g, the best of k sampled tokens follows chosen(x) = (F(g)^k - F(g - 1)^k) draft(x) / (F(g) - F(g - 1)),
    which replaces the draft's distribution in the ratios and residuals of `block`.
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
        target_BV = values_at(target_probs_BNV, node_B)
        draft_BV = values_at(draft.draft_probs_BNV, node_B).to(target_BV.dtype)
        chosen_BV, grade_BV = best_of_samples(target_BV, draft_BV, num_children_B)
        residual_BV = (weight_B[:, None] * target_BV - chosen_BV).clamp_(min=0)
        mass_B = residual_BV.sum(-1)
        total_B = mass_B + 1 - weight_B
        has_children_B = num_children_B > 0
        threshold_B = torch.where(has_children_B, torch.where(total_B > 0, mass_B / total_B, 1.0), weight_B)
        passes_B = (pick(uniforms_BU, node_B) < threshold_B) | (node_B == 0)
        end_B = torch.where(passes_B, node_B, end_B)
        after_BV = torch.where(has_children_B[:, None], residual_BV, target_BV)
        next_probs_BV = torch.where(passes_B[:, None], after_BV, next_probs_BV)
        if not has_children_B.any():
            break
        grade_BN = grade_BV[rows_B1, draft.tokens_BN].masked_fill(~is_child_BN, -1)
        # The first of equal grades: argmax alone does not guarantee it.
        order_N = torch.arange(draft.tree.num_nodes, device=grade_BN.device)
        child_B = (grade_BN * len(order_N) - order_N).argmax(1)
        token_B = pick(draft.tokens_BN, child_B)
        ratio_B = pick(target_BV, token_B) / pick(chosen_BV, token_B)
        weight_B = torch.where(has_children_B, (weight_B * ratio_B).clamp(max=1), weight_B)
        node_B = torch.where(has_children_B, pick(siblings.first_BN, child_B), node_B)
    return sample_next(end_B, next_probs_BV, target_probs_BNV, uniforms_BU[:, -1], draft)


def best_of_samples(target_BV: Tensor, draft_BV: Tensor, num_samples_B: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the distribution [B, V] of the best-graded of `num_samples_B` draft samples, and the grades [B, V].

    Running sums are in float64: their powers differ by less than float32 resolves.
    """
    ratio_BV = (target_BV / draft_BV).log2_().mul_(PER_OCTAVE)
    # A token with probability 0 in both gives NaN; it is never drawn.
    grade_BV = ratio_BV.nan_to_num_(nan=0.0).clamp_(-OCTAVES * PER_OCTAVE, OCTAVES * PER_OCTAVE).round_().long()
    grade_BV += OCTAVES * PER_OCTAVE
    mass_BG = draft_BV.new_zeros(len(draft_BV), 2 * OCTAVES * PER_OCTAVE + 1).scatter_add_(1, grade_BV, draft_BV)
    running_BG = mass_BG.double().cumsum(-1)
    power_BG = (running_BG / running_BG[:, -1:]) ** num_samples_B[:, None]
    probs_BG = power_BG - torch.nn.functional.pad(power_BG[:, :-1], (1, 0))
    # Within a grade the first sample is taken, which follows the draft's distribution.
    factor_BG = torch.where(mass_BG > 0, probs_BG / mass_BG, 0.0).to(draft_BV.dtype)
    return factor_BG.gather(1, grade_BV).mul_(draft_BV), grade_BV
