"""Compares a target with its model's own forward on eight tokens, in its own dtype, when the target is made.

What the comparisons do not show to be right is refused in a sentence instead of decoding wrong text.

Shape suffixes: B rows, T tokens, N nodes of a tree, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from draftsmith.core.tree import Tree, chain
from draftsmith.core.views import HiddenStateOutput, Outputs, recorded_outputs

NUM_TOKENS, NUM_PREFILLED = 8, 4
ERRORS = (AttributeError, TypeError, KeyError, IndexError, RuntimeError, ValueError)
"""What a model raises for arguments that it does not expect."""


@dataclass(kw_only=True)
class Abilities:
    """What a target was found to do rightly."""

    outputs: Outputs = field(default_factory=Outputs)
    """What its blocks and their sublayers return."""
    head_is_linear: bool = False
    cannot_split: str = ""
    """Why its blocks cannot be run in parts; empty if they can."""
    cannot_batch: str = ""
    """Why rows of unequal lengths cannot be run in one batch."""
    cannot_train: str = ""
    """Why whole texts cannot be read without a cache."""


def ordinary_tokens(vocab_size: int) -> Tensor:
    """Returns eight tokens [1, T]: not padding and special ones, which have low ids and are often untrained."""
    lowest = min(8, vocab_size // 2)
    return lowest + torch.arange(NUM_TOKENS)[None] * 7919 % (vocab_size - lowest)


@torch.inference_mode()
def check_against_model(target: Any) -> None:
    """Compares prefill, a draft, a rejected draft, unequal rows, spans and a whole text with the model's own forward.

    Fills in the target's abilities. Raises ValueError, naming the architecture, if drafts cannot be verified.
    """
    _SelfCheck(target).run()


class _SelfCheck:
    def __init__(self, target: Any) -> None:
        self._target, self._model, self._name = target, target.model, type(target.model).__name__
        self._ids_1T = ordinary_tokens(target.vocab_size).to(target.device)
        self._source: Any = None

    def run(self) -> None:
        target, abilities = self._target, self._target.abilities
        try:
            expected_TV = self._expected_logits()
        except ERRORS as error:
            reason = f"({_first_line(error)}){self._several_dtypes()}"
            raise ValueError(f"{self._name} fails in its own forward of a text {reason}") from error
        try:
            found_NV, hidden_ND = self._draft()
        except ERRORS as error:
            reason = f"it does not take their cache and mask{self._several_dtypes()}"
            raise ValueError(f"{self._name} cannot be run over draft trees: {reason}") from error
        if (gap := self._gap(found_NV, expected_TV[NUM_PREFILLED:])) is not None:
            raise ValueError(
                f"{self._name} returns other logits for a draft tree than in its own forward (off by"
                f" {gap:.2g}), so draftsmith cannot verify drafts for it{self._quantised_activations()}"
            )
        abilities.cannot_batch = self._problem_of(self._logits_of_unequal_rows, expected_TV[[4, 5, 2, 3]])
        if target.is_run_whole:
            return
        abilities.cannot_train = self._problem_of(self._logits_of_whole_text, expected_TV)
        if not target.is_encoder_decoder:
            abilities.cannot_split = self._problem_of(self._hidden_in_two_spans, hidden_ND)

    def _several_dtypes(self) -> str:
        kinds = sorted({str(weight.dtype).removeprefix("torch.") for weight in self._model.parameters()})
        return f"; its weights are of {' and '.join(kinds)}, so cast them to one" if len(kinds) > 1 else ""

    def _expected_logits(self) -> Tensor:
        """Returns the model's own logits [T, V], and records what its blocks return."""
        target, given = self._target, {"input_ids": self._ids_1T}
        if target.is_encoder_decoder:
            self._source = target.encode(self._ids_1T, torch.ones_like(self._ids_1T))
            encoded = HiddenStateOutput(last_hidden_state=self._source.encoded_BTD)
            given = {"decoder_input_ids": self._ids_1T, "attention_mask": self._source.mask_BT}
            with recorded_outputs(target.find_stack()) as target.abilities.outputs:
                return self._model(encoder_outputs=encoded, **given).logits[0]
        if target.is_run_whole:
            return self._model(**given).logits[0]
        with recorded_outputs(target.find_stack()) as target.abilities.outputs:
            return self._model(**given).logits[0]

    def _draft(self) -> tuple[Tensor, Tensor]:
        """Returns logits [N, V] and the last hidden states at tokens 4 to 7: of a tree, if the target takes trees.

        A target with recurrent state has a wrong draft taken back before.
        """
        target, ids_1T = self._target, self._ids_1T
        cache = target.new_cache(1, source=self._source)
        if target.is_recurrent:
            target.prefill([ids_1T[0, : NUM_PREFILLED - 1].tolist()], cache)
            wrong_1N = ids_1T[:, [NUM_PREFILLED - 1, 0, 1]]
            target.forward(wrong_1N, chain(3, target.device), cache)
            cache.commit([[0]])
        else:
            target.prefill([ids_1T[0, :NUM_PREFILLED].tolist()], cache)
        if target.takes_trees:
            tree = Tree.from_parents([[-1, 0, 0, 2, 3]], target.device)
            fed_1N, path = ids_1T[:, [4, 0, 5, 6, 7]], [0, 2, 3, 4]
        else:
            tree, fed_1N, path = chain(4, target.device), ids_1T[:, NUM_PREFILLED:], [0, 1, 2, 3]
        out = target.forward(fed_1N, tree, cache, layers=() if target.is_run_whole else (0, 1))
        found_NV = target.logits(out.hidden_BND)[0, path]
        if (linear := self._model.get_output_embeddings()) is not None and not target.is_run_whole:
            normed_BND = target.norm(out.hidden_BND)
            target.abilities.head_is_linear = torch.equal(linear(normed_BND), target.head(normed_BND))
        return found_NV, out.hidden_BND[0, path]

    def _logits_of_unequal_rows(self) -> Tensor:
        """Returns the logits of tokens 4 and 5 behind four, and of tokens 2 and 3 behind two, computed in one batch."""
        target, ids_T, source = self._target, self._ids_1T[0], self._source
        if source is not None:
            source = target.encode(source.tokens_BT.repeat(2, 1), source.mask_BT.repeat(2, 1))
        cache = target.new_cache(2, source=source)
        target.prefill([ids_T[:4].tolist(), ids_T[:2].tolist()], cache)
        out = target.forward(torch.stack([ids_T[4:6], ids_T[2:4]]), chain(2, target.device), cache)
        return target.logits(out.hidden_BND).flatten(0, 1)

    def _logits_of_whole_text(self) -> Tensor:
        last = self._target.num_layers
        return self._target.logits(self._target.read(self._ids_1T, (last,), self._source)[last])[0]

    def _hidden_in_two_spans(self) -> Tensor:
        """Returns the last block's output at tokens 4 to 7 behind four, the blocks run in two parts.

        The lower one is fed two tokens at a time, as drafters do that run the target's first blocks.
        """
        target, ids_1T = self._target, self._ids_1T
        cache, half, tree = target.new_cache(1), max(target.num_layers // 2, 1), chain(4, target.device)
        target.prefill([ids_1T[0, :4].tolist()], cache)
        first_1ND = target.forward(ids_1T[:, 4:6], chain(2, target.device), cache, span=(0, half)).hidden_BND
        second_1ND = target.forward(ids_1T[:, 6:], tree, cache, span=(0, half), first=2).hidden_BND
        span, below_1ND = (half, target.num_layers), torch.cat([first_1ND, second_1ND], dim=1)
        out = target.forward(ids_1T[:, 4:], tree, cache, span=span, resume_BND=below_1ND)
        return out.hidden_BND[0]

    def _gap(self, found: Tensor, expected: Tensor) -> float | None:
        """Returns how far two results are apart, relative to the largest value; None if no further than rounding."""
        tolerance = 1e-3 if expected.dtype in (torch.float32, torch.float64) else 0.1
        gap = (found - expected).abs().max().item() / max(1.0, expected.abs().max().item())
        return None if gap < tolerance else gap

    def _problem_of(self, compute: Callable[[], Tensor], expected: Tensor) -> str:
        """Returns why a computation fails, or how far off its result is; empty if it is right."""
        try:
            gap = self._gap(compute(), expected)
        except ERRORS as error:
            return _first_line(error)
        return "" if gap is None else f"off by {gap:.2g}"

    def _quantised_activations(self) -> str:
        kinds = {type(part).__name__ for part in self._model.modules() if "quantized.dynamic" in type(part).__module__}
        return (
            f": its {', '.join(kinds)} layers round activations depending on the other tokens of a forward"
            if kinds
            else ""
        )


def _first_line(error: Exception) -> str:
    return str(error).split("\n")[0]
