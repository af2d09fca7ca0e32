"""Cross-attention of a small drafter to the source of an encoder-decoder target, with an optional copy mechanism.

The target's encoder states are projected once per call; the drafter's features after each token attend to them once
(1508.04025, section 3.1), and the attention output is added to the features. With copies the next-token distribution is
g softmax(logits) + (1 - g) times the attention on the source positions of each token (1704.04368, equation 9). That is
the drafter's distribution at temperature 1; at other temperatures its logarithms are used as logits.

Shape suffixes: B rows, S source tokens, E width of the target's states, D width of the features, G of the summary,
M tokens after each row's text, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from draftsmith.core.target import Source, Target
from draftsmith.loading.model_info import TargetInfo

MIN_PROB = 1e-30
"""Added to every probability of a mixed distribution, so that its logarithms are finite."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ProjectedSource:
    """The keys, values and summary of one batch of sources."""

    keys_BDS: Tensor
    values_BSD: Tensor
    padding_B1S: Tensor
    """0 for source tokens, and less than any score for padding."""
    summary_BG: Tensor
    """A linear map of the mean state."""
    rows_B11: Tensor
    """Each row's number, which features with copies carry to their logits."""


class CrossAttention(nn.Module):
    """Attends to sources from features of `width`; for a causal target it has no weights and does nothing."""

    def __init__(self, target: Target, width: int, summary_width: int, *, copies: bool) -> None:
        super().__init__()
        check(target, copies=copies)
        self._is_used, self._width = target.is_encoder_decoder, width
        self.gate = nn.Linear(width, 1) if copies else None
        if self._is_used:
            self.keys = nn.Linear(target.hidden_size, width, bias=False)
            self.values = nn.Linear(target.hidden_size, width, bias=False)
            self.summary = nn.Linear(target.hidden_size, summary_width)

    def project(self, source: Source | None) -> ProjectedSource | None:
        """Returns the source as `attend` takes it, None for a causal target."""
        if not self._is_used:
            return None
        assert source is not None, "an encoder-decoder target's text needs its source"
        encoded = source.encoded_BTD.to(self.keys.weight.dtype)
        states_BSE, mask_BS = functional.rms_norm(encoded, encoded.shape[-1:]), source.mask_BT.bool()
        weights_BS1 = (mask_BS / mask_BS.sum(1, keepdim=True))[:, :, None].to(states_BSE.dtype)
        lowest = torch.finfo(states_BSE.dtype).min
        return ProjectedSource(
            keys_BDS=self.keys(states_BSE).mT,
            values_BSD=self.values(states_BSE),
            padding_B1S=torch.zeros_like(states_BSE[:, None, :, 0]).masked_fill(~mask_BS[:, None], lowest),
            summary_BG=self.summary((states_BSE * weights_BS1).sum(1)),
            rows_B11=torch.arange(len(mask_BS), device=mask_BS.device)[:, None, None],
        )

    def attend(self, features: Tensor, source: ProjectedSource | None) -> Tensor:
        """Returns features [B, M, D] or [B * M, D] with the attention output added.

        With copies [..., D + S + 1], in float32 or wider: the attention weights and the row number are appended for
        `copy_head`.
        """
        if source is None:
            return features
        features_BMD = features.reshape(len(source.keys_BDS), -1, self._width)
        scores_BMS = torch.baddbmm(source.padding_B1S, features_BMD, source.keys_BDS, alpha=self._width**-0.5)
        attention_BMS = scores_BMS.softmax(-1)
        attended_BMD = torch.baddbmm(features_BMD, attention_BMS, source.values_BSD)
        if self.gate is not None:
            rows_BM1 = source.rows_B11.expand(-1, features_BMD.shape[1], -1).float()
            attended_BMD = torch.cat([attended_BMD, attention_BMS, rows_BM1], dim=-1)
        return attended_BMD.view(*features.shape[:-1], -1)

    def copy_head(self, head: Callable[[Tensor], Tensor], source: Source | None) -> Callable[[Tensor], Tensor]:
        """Returns the map from the output of `attend` to logits [..., V]: `head`, mixed with copies if any."""
        gate = self.gate
        if gate is None or source is None:
            return head
        tokens_BS = source.tokens_BT

        def mixed_log_probs(carried: Tensor) -> Tensor:
            features = carried[..., : self._width].to(gate.weight.dtype)
            attention, rows = carried[..., self._width : -1], carried[..., -1].long()
            share = gate(features).to(carried.dtype).sigmoid()
            probs = head(features).to(carried.dtype).softmax(-1) * share
            return (probs.scatter_add(-1, tokens_BS[rows], attention * (1 - share)) + MIN_PROB).log()

        return mixed_log_probs


def check(target: Target | TargetInfo, *, copies: bool, width: int = 0) -> None:
    """Raises ValueError for copies with a causal target, and for trees with an encoder-decoder target."""
    if width and target.is_encoder_decoder:
        raise ValueError(f"width is {width}, for trees, and {target.name} is an encoder-decoder: it verifies chains")
    if copies and not target.is_encoder_decoder:
        raise ValueError(f"copy is set, and target {target.name} is causal: it has no source to copy from")
