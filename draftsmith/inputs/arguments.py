"""Converts numbers and token ids of the kinds that callers have: Python's, numpy's and torch's.

Every function raises ValueError, naming the argument, for a value that it cannot mean.
"""

import math
import warnings
from collections.abc import Collection, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from draftsmith.core.drafter import Drafter

UNAPPLIED = (
    "repetition_penalty",
    "encoder_repetition_penalty",
    "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size",
    "bad_words_ids",
    "suppress_tokens",
    "begin_suppress_tokens",
    "sequence_bias",
    "min_length",
    "min_new_tokens",
    "exponential_decay_length_penalty",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "guidance_scale",
    "min_p",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
    "stop_strings",
    "max_time",
)
"""Settings of a generation config, besides temperature, top-k and top-p, that change what is generated."""
NEUTRAL: tuple[Any, ...] = (None, 0, 1, [], ())
"""Values with which these settings change nothing."""
SEEDS = (-(2**63), 2**64)
"""Range of the seeds of torch's generators, the end excluded."""


def check_target(target: Any) -> None:
    """Rejects anything but a Target, such as a model or its name."""
    if isinstance(target, str | Path):
        raise ValueError(f"target is {shown(target)}; pass draftsmith.Target.from_pretrained({str(target)!r})")
    if isinstance(target, type) or not hasattr(
        target, "tokenizer_hash"
    ):  # a target that runs in a server is no Target, but has its attributes
        raise ValueError(f"target is {shown(target)}; pass draftsmith.Target(model, tokenizer)")


def check_drafter(drafter: Any) -> None:
    """Rejects anything but a drafter, such as the path of an artifact."""
    if not isinstance(drafter, Drafter):
        raise ValueError(f"drafter is {shown(drafter)}; pass the drafter that draftsmith.load(path, target) returns")


def check_path(path: Any) -> None:
    """Rejects anything but a path or name of an artifact."""
    if not isinstance(path, str | PathLike):
        raise ValueError(f"path is {shown(path)}; it must be the folder of an artifact")


def check_objects(
    target: Any, drafter: Any, *, verifier: Any, length: Any, streamer: Any = None, batch_invariant: Any = None
) -> None:
    """Rejects objects that are not of the kind that `generate` takes, and a drafter of another Target."""
    check_target(target)
    if drafter is not None:
        check_drafter(drafter)
    if drafter is not None and drafter.target is not target:
        raise ValueError(
            "the drafter drafts for another Target object; load it with this one, or pass drafter.target if the"
            " drafter fine-tunes its target"
        )
    if not isinstance(verifier, str):
        raise ValueError(f"verifier is {shown(verifier)}; it must be the name of one, or 'auto'")
    if not isinstance(length, str) and not hasattr(length, "learn"):
        raise ValueError(f"length is {shown(length)}; it must be a length policy or its name, such as 'fixed=4'")
    if not isinstance(batch_invariant, bool | None):
        raise ValueError(f"batch_invariant is {shown(batch_invariant)}; it must be True, False or None")
    if streamer is not None and not all(callable(getattr(streamer, name, None)) for name in ("put", "end")):
        raise ValueError(f"streamer is {shown(streamer)}; it must have the methods put(tokens) and end()")


def warn_of_unapplied_settings(target: Any, *, stacklevel: int) -> None:
    """Warns of settings in the target's generation config that change its distribution, but not here."""
    config = target.model.generation_config
    values = {name: getattr(config, name, None) for name in UNAPPLIED}
    given = ", ".join(f"{name}={value!r}" for name, value in values.items() if value not in NEUTRAL)
    if given:
        warnings.warn(
            f"the generation config of target {target.name} sets {given}, which are not applied: the text follows"
            " the distribution of the model without them; pass generation_config='model' to apply them",
            stacklevel=stacklevel,
        )


def whole_number(name: str, value: Any) -> int:
    """Returns a whole number given as an integer, a float such as 2.0 or an array or tensor of no dimensions."""
    found = plain(value)
    if isinstance(found, float) and found.is_integer():
        found = int(found)
    if isinstance(found, bool) or not isinstance(found, int):
        raise ValueError(f"{name} is {shown(value)}; it must be a whole number")
    return found


def real_number(name: str, value: Any) -> float:
    """Returns a finite number given as a Python number or an array or tensor of no dimensions."""
    found = plain(value)
    if isinstance(found, bool) or not isinstance(found, int | float) or not math.isfinite(found):
        raise ValueError(f"{name} is {shown(value)}; it must be a finite number")
    return found


def torch_seed(value: Any) -> int:
    """Returns a seed of torch's generators."""
    found = whole_number("seed", value)
    if not SEEDS[0] <= found < SEEDS[1]:
        raise ValueError(f"seed is {found}; it must be a whole number of at most 64 bits")
    return found


def row_identities(seed: Any, num_rows: int, *, is_coupled: bool) -> list[tuple[int, int]]:
    """Returns each row's seed and its index among the rows with this seed: one seed for all rows, or one for each row.

    None draws a seed from torch's global generator.
    """
    found = plain(seed)
    if not isinstance(found, list):
        shared = int(torch.randint(2**62, ())) if seed is None else torch_seed(seed)
        return [(shared, row) for row in range(num_rows)]
    if not is_coupled:
        raise ValueError("seed is a list, a seed for each row, which needs verifier='coupled'; pass one seed otherwise")
    if len(found) != num_rows:
        raise ValueError(f"seed has {len(found)} entries; it must be one seed, or one for each of the {num_rows} rows")
    return [(torch_seed(one), 0) for one in found]


def token_ids(name: str, value: Any) -> list[int]:
    """Returns ids given as one id or a list, tuple, set, array or tensor of them."""
    found = plain(sorted(value) if isinstance(value, set | frozenset) else value)
    ids = found if isinstance(found, list) else [found]
    if not set(map(type, ids)) <= {int}:
        raise ValueError(f"{name} is {shown(value)}; it must be a token id or a list of token ids")
    return ids


def prompt_rows(input_ids: Any, attention_mask: Any) -> list[list[int]]:
    """Returns each prompt's ids without padding.

    `input_ids` may be one prompt or several, in lists, arrays or tensors, or the output of a tokenizer with its
    attention mask. Lists may be of unequal lengths.
    """
    if isinstance(input_ids, Mapping):
        if "input_ids" not in input_ids:
            raise ValueError(f"input_ids is a mapping of {', '.join(map(str, input_ids))}; it must hold 'input_ids'")
        mask = input_ids.get("attention_mask") if attention_mask is None else attention_mask
        return prompt_rows(input_ids["input_ids"], mask)
    rows = _rows("input_ids", input_ids)
    if not rows:
        raise ValueError(f"input_ids {_extent(input_ids)}; it must be [batch, length] with a row or more")
    if wrong := [entry for row in rows for entry in row if type(entry) is not int]:
        raise ValueError(f"input_ids holds {shown(wrong[0])}; it must hold token ids, as tokenizer(text) returns them")
    if attention_mask is None:
        return rows
    masks = _rows("attention_mask", attention_mask)
    if list(map(len, masks)) != list(map(len, rows)):
        raise ValueError(f"attention_mask has shape {_shape(masks)}; it must be that of input_ids, {_shape(rows)}")
    return [_unpadded(row, mask) for row, mask in zip(rows, masks, strict=True)]


def plain(value: Any) -> Any:
    """Returns arrays and tensors, also inside lists and tuples, as lists of Python numbers."""
    if getattr(value, "is_meta", False):
        raise ValueError(f"a tensor of shape {tuple(value.shape)} is on the device meta, which holds no numbers")
    if hasattr(value, "tolist"):
        return value.tolist()
    return [plain(part) for part in value] if isinstance(value, list | tuple) else value


def shown(value: Any) -> str:
    """Returns a value as an error message shows it."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 40 else f"a {type(value).__name__}"


def _rows(name: str, value: Any) -> list[list[Any]]:
    """Returns one row or several as lists of entries that are not lists."""
    found = plain(value)
    if not isinstance(found, list):
        raise ValueError(f"{name} is {shown(value)}; pass what tokenizer(text) returns, or numbers [batch, length]")
    rows = [found] if found and not any(isinstance(row, list) for row in found) else found
    if not all(isinstance(row, list) and not any(isinstance(entry, list) for entry in row) for row in rows):
        raise ValueError(f"{name} {_extent(value)}; it must be [batch, length], or one row")
    return rows


def _unpadded(row: list[int], mask: list[Any]) -> list[int]:
    if wrong := [entry for entry in mask if entry not in (0, 1)]:
        raise ValueError(f"attention_mask holds {shown(wrong[0])}; it must hold 1 for each token and 0 for padding")
    num_kept = int(sum(mask))
    start = mask.index(1) if num_kept else 0
    if not all(mask[start : start + num_kept]) or (start > 0 and start + num_kept < len(mask)):
        raise ValueError("attention_mask has holes; each row must be padded at its left or its right end only")
    return row[start : start + num_kept]


def _shape(rows: Collection[list[Any]]) -> tuple[int, ...] | str:
    lengths = {len(row) for row in rows}
    return (len(rows), *lengths) if len(lengths) == 1 else f"of rows of {', '.join(str(len(row)) for row in rows)}"


def _extent(value: Any) -> str:
    return f"has shape {tuple(value.shape)}" if hasattr(value, "shape") else f"is {shown(value)}"
