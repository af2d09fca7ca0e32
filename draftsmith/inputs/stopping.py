"""Stops rows at transformers' stopping criteria, besides lengths and end-of-sequence tokens."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers.generation import stopping_criteria as hf

from draftsmith.inputs.arguments import shown

FILLER = 2**31 - 1
"""Padding of stop strings' windows: a token id that no vocabulary has, and which matches nothing."""
BY_TOKEN = "draftsmith calls stopping criteria after each committed token of one row"


def check_stop_strings(stop_strings: Any, tokenizer: Any) -> hf.StopStringCriteria:
    """Returns the criterion of one stop string or several; raises ValueError without a tokenizer or for empty ones."""
    strings = [stop_strings] if isinstance(stop_strings, str) else stop_strings
    is_list = isinstance(strings, list | tuple) and len(strings) > 0
    if not is_list or not all(isinstance(string, str) and string for string in strings):
        raise ValueError(f"stop_strings is {shown(stop_strings)}; it must be a text or a list of texts, none empty")
    if tokenizer is None:
        raise ValueError(
            f"stop_strings is {shown(stop_strings)}, but the target has no tokenizer; make it as Target(model,"
            " tokenizer)"
        )
    try:
        return hf.StopStringCriteria(tokenizer, list(strings))
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"stop_strings is {shown(stop_strings)}: {error}") from error


class StopConditions:
    """The stopping criteria of one call of `generate`, evaluated after each committed token, as in `model.generate`.

    Raises ValueError for criteria of a user's own at batch sizes above 1, where transformers calls them on all rows.
    """

    def __init__(self, criteria: Sequence[Any], num_rows: int, device: torch.device) -> None:
        self._device = device
        self._times = [one for one in criteria if isinstance(one, hf.MaxTimeCriteria)]
        self._strings = [one for one in criteria if type(one) is hf.StopStringCriteria]
        self._others = [one for one in criteria if one not in [*self._times, *self._strings]]
        for criterion in self._others:
            name = type(criterion).__name__
            if not callable(criterion):
                raise ValueError(f"stopping criterion {name} cannot be called with (input_ids, scores)")
            if isinstance(criterion, hf.ConfidenceCriteria):
                raise ValueError(
                    f"stopping criterion {name} is not supported: it is for assistant models; leave it out"
                )
            if num_rows > 1:
                raise ValueError(
                    f"stopping criterion {name} is not supported for {num_rows} rows: {BY_TOKEN}; generate row by row"
                )

    def is_out_of_time(self) -> bool:
        """Returns whether the time of `max_time` has passed."""
        return any(bool(criterion(torch.zeros(1, 1), None).all()) for criterion in self._times)

    def cut(self, row: Sequence[int], new: list[int]) -> tuple[list[int], bool]:
        """Returns the row's `new` tokens up to the first at which a criterion stops it, and whether one does."""
        ends = [end for criterion in self._strings if (end := _first_end(criterion, row, new)) is not None]
        for count in range(1, len(new) + 1) if self._others else ():
            if ends and count > min(ends):
                break
            ids = torch.tensor([[*row, *new[:count]]], device=self._device)
            if any(_stops(criterion, ids) for criterion in self._others):
                ends.append(count)
        return (new[: min(ends)], True) if ends else (new, False)


def _first_end(criterion: hf.StopStringCriteria, row: Sequence[int], new: list[int]) -> int | None:
    """Returns the number of new tokens with which a stop string is complete; None if none is."""
    width = int(criterion.maximum_token_len)
    ids = [FILLER] * width + [*row[-width:], *new]
    windows = torch.tensor([ids[end - width : end] for end in range(len(ids) - len(new) + 1, len(ids) + 1)])
    is_stopped = criterion(windows, None).tolist()
    return is_stopped.index(True) + 1 if True in is_stopped else None


def _stops(criterion: Any, ids: torch.Tensor) -> bool:
    try:
        return bool(torch.as_tensor(criterion(ids, None)).all())
    except Exception as error:
        name = type(criterion).__name__
        raise ValueError(f"stopping criterion {name} failed ({BY_TOKEN}, without scores): {error}") from error
