"""K-SEQ verification of several independent drafts, level by level: SpecTr, Sun et al. 2310.15141, algorithm 2.

Shape suffixes: B rows, N nodes, V vocabulary.
"""

import torch
from torch import Tensor

from draftsmith.core.tree import Draft, Verdict
from draftsmith.verify.paths import Siblings, sample_next, values_at

LOSSLESS = True
SCHEMES = ("independent",)
HALVINGS = 10


def verify(target_probs_BNV: Tensor, draft: Draft, uniforms_BU: Tensor) -> Verdict:
    """Accepts, on each level, the first of k children with u rho draft(x) < target(x); nodes of equal text are one.

    With beta = sum min(draft, target / rho), rho is the least in [1, k] for which a = 1 - (1 - beta)^k <= rho beta:
    the acceptance rate is within a factor 1 - 1/e of the optimum. If no child passes, the next token follows
    target - min(draft, target / rho) a / beta.
    """
    assert draft.draft_probs_BNV is not None
    siblings, tokens_BN = Siblings(draft), draft.tokens_BN
    rows_B1 = torch.arange(len(tokens_BN), device=tokens_BN.device)[:, None]
    end_B = torch.zeros_like(tokens_BN[:, 0])
    is_active_B = torch.ones_like(end_B, dtype=torch.bool)
    end_rho_B, end_factor_B = torch.ones_like(target_probs_BNV[:, 0, 0]), torch.zeros_like(target_probs_BNV[:, 0, 0])
    draft_probs_BNV = draft.draft_probs_BNV.to(target_probs_BNV.dtype)
    while True:
        is_child_BN = siblings.of(end_B) & is_active_B[:, None]
        num_children_B = is_child_BN.sum(1)
        if not num_children_B.any():
            break
        target_BV, draft_BV = values_at(target_probs_BNV, end_B), values_at(draft_probs_BNV, end_B)
        rho_B, beta_B = least_rho(target_BV, draft_BV, num_children_B)
        threshold_BN = uniforms_BU[:, :-1] * rho_B[:, None] * draft_BV[rows_B1, tokens_BN]
        passes_BN = is_child_BN & (threshold_BN < target_BV[rows_B1, tokens_BN])
        child_B1 = passes_BN.to(torch.uint8).argmax(1, keepdim=True)
        is_active_B = passes_BN.any(1)
        is_rejected_B = ~is_active_B & (num_children_B > 0)
        acceptance_B = 1 - (1 - beta_B).clamp(min=0) ** num_children_B
        end_rho_B = torch.where(is_rejected_B, rho_B, end_rho_B)
        end_factor_B = torch.where(is_rejected_B & (beta_B > 0), acceptance_B / beta_B, end_factor_B)
        end_B = torch.where(is_active_B, siblings.first_BN.gather(1, child_B1)[:, 0], end_B)
    target_BV = values_at(target_probs_BNV, end_B)
    shared_BV = (target_BV / end_rho_B[:, None]).minimum(values_at(draft_probs_BNV, end_B))
    next_probs_BV = target_BV.addcmul_(shared_BV, end_factor_B[:, None], value=-1).clamp_(min=0)
    return sample_next(end_B, next_probs_BV, target_probs_BNV, uniforms_BU[:, -1], draft)


def least_rho(target_BV: Tensor, draft_BV: Tensor, num_children_B: Tensor) -> tuple[Tensor, Tensor]:
    """Returns approximately the least rho [B] in [1, k] with 1 - (1 - beta)^k <= rho beta, never less, and beta [B].

    Verification is lossless for any rho that satisfies this; `HALVINGS` are enough for the acceptance rate.
    """
    memory_BV = torch.empty_like(target_BV)

    def beta_of(rho_B: Tensor) -> Tensor:
        shared_BV = torch.div(target_BV, rho_B[:, None], out=memory_BV)
        return torch.minimum(shared_BV, draft_BV, out=memory_BV).sum(-1)

    low_B = torch.ones_like(target_BV[:, 0])
    high_B = num_children_B.to(target_BV.dtype).clamp(min=1)
    high_beta_B = beta_of(high_B)
    for _ in range(HALVINGS):
        rho_B = (low_B + high_B) / 2
        beta_B = beta_of(rho_B)
        holds_B = 1 - (1 - beta_B).clamp(min=0) ** num_children_B <= rho_B * beta_B
        high_B, low_B = torch.where(holds_B, rho_B, high_B), torch.where(holds_B, low_B, rho_B)
        high_beta_B = torch.where(holds_B, beta_B, high_beta_B)
    return high_B, high_beta_B
