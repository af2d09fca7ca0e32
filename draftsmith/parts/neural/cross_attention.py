"""What a small drafter reads of the source of an encoder-decoder target: one attention read a token, and copies.

The target's own encoder has read the source already. Its states are projected once a call, the drafter's features after
each token attend to them once (1508.04025, section 3.1), and what they find is added to them. With copies the next
token's law is g softmax(logits) + (1 - g) times the attention on the source tokens that it may be (1704.04368,
equation 9). That law is the drafter's at temperature 1; at others it is the law of its logarithms, taken as logits.

Shape suffixes: B rows, S source tokens, E width of the target's states, D width of the features, G of the summary,
M tokens after each row's text, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from draftsmith.core.model_info import TargetFacts
from draftsmith.core.target import Source, Target

LEAST = 1e-30
"""Added to every probability of a mixed law, so that its logarithms are finite."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Projected:
    """What features are asked against, of one batch of sources."""

    keys_BDS: Tensor
    values_BSD: Tensor
    padding_B1S: Tensor
    """0, or less than any score where a row has ended."""
    summary_BG: Tensor
    """A linear map of the mean state."""
    rows_B11: Tensor
    """Each row's number, which features with copies carry to their logits."""


class SourceReader(nn.Module):
    """Reads sources for features of `width`; it has no weights and does nothing if the target is causal."""

    def __init__(self, target: Target, width: int, summary_width: int, *, copies: bool) -> None:
        super().__init__()
        check(target, copies=copies)
        self._is_used, self._width = target.is_encoder_decoder, width
        self.gate = nn.Linear(width, 1) if copies else None
        if self._is_used:
            self.keys = nn.Linear(target.hidden_size, width, bias=False)
            self.values = nn.Linear(target.hidden_size, width, bias=False)
            self.summary = nn.Linear(target.hidden_size, summary_width)

    def project(self, source: Source | None) -> Projected | None:
        """Returns the sources as `look` takes them, None for a causal target."""
        if not self._is_used:
            return None
        assert source is not None, "the sources of an encoder-decoder's text must be given"
        encoded = source.encoded_BTD.to(self.keys.weight.dtype)
        states_BSE, mask_BS = functional.rms_norm(encoded, encoded.shape[-1:]), source.mask_BT.bool()
        weights_BS1 = (mask_BS / mask_BS.sum(1, keepdim=True))[:, :, None].to(states_BSE.dtype)
        lowest = torch.finfo(states_BSE.dtype).min
        return Projected(
            keys_BDS=self.keys(states_BSE).mT,
            values_BSD=self.values(states_BSE),
            padding_B1S=torch.zeros_like(states_BSE[:, None, :, 0]).masked_fill(~mask_BS[:, None], lowest),
            summary_BG=self.summary((states_BSE * weights_BS1).sum(1)),
            rows_B11=torch.arange(len(mask_BS), device=mask_BS.device)[:, None, None],
        )

    def look(self, features: Tensor, source: Projected | None) -> Tensor:
        """Returns features [B, M, D] or [B * M, D] with what they find in the sources added.

        With copies [..., D + S + 1], in float32 or wider: `head` is given where they looked, and the row, beside them.
        """
        if source is None:
            return features
        features_BMD = features.reshape(len(source.keys_BDS), -1, self._width)
        scores_BMS = torch.baddbmm(source.padding_B1S, features_BMD, source.keys_BDS, alpha=self._width**-0.5)
        attention_BMS = scores_BMS.softmax(-1)
        found_BMD = torch.baddbmm(features_BMD, attention_BMS, source.values_BSD)
        if self.gate is not None:
            rows_BM1 = source.rows_B11.expand(-1, features_BMD.shape[1], -1).float()
            found_BMD = torch.cat([found_BMD, attention_BMS, rows_BM1], dim=-1)
        return found_BMD.view(*features.shape[:-1], -1)

    def head(self, head: Callable[[Tensor], Tensor], source: Source | None) -> Callable[[Tensor], Tensor]:
        """Returns what `look` returned [..., X] -> logits [..., V], by a `head` that takes features without copies."""
        gate = self.gate
        if gate is None or source is None:
            return head
        tokens_BS = source.tokens_BT

        def mixed(carried: Tensor) -> Tensor:
            features = carried[..., : self._width].to(gate.weight.dtype)
            attention, rows = carried[..., self._width : -1], carried[..., -1].long()
            share = gate(features).to(carried.dtype).sigmoid()
            law = head(features).to(carried.dtype).softmax(-1) * share
            return (law.scatter_add(-1, tokens_BS[rows], attention * (1 - share)) + LEAST).log()

        return mixed


def check(target: Target | TargetFacts, *, copies: bool, width: int = 0) -> None:
    """Raises ValueError for copies if the target is causal, and for trees of this width if it is not."""
    if width and target.is_encoder_decoder:
        raise ValueError(f"width is {width}, for trees, and {target.name} is an encoder-decoder: it verifies chains")
    if copies and not target.is_encoder_decoder:
        raise ValueError(f"copy is set, and target {target.name} is causal: it has no source to copy from")
