"""Rows for encoder-decoders: pairs of a source column, which the encoder reads, and a label column."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from data.sources.records import Row, RowError, check_row

KNOWN = (("article", "highlights"), ("document", "summary"), ("source", "target"), ("text", "summary"))
"""Pairs of columns recognised by their names, as in CNN/DailyMail, XSum and most other data sets."""


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Source and label column, as in `owner/name@body,title` or `pairs.jsonl@en,de,translate to German: `."""

    source: str
    """Column of the encoder's input."""
    label: str
    """Column of the decoder's output."""
    prefix: str = ""
    """Text before every source, such as the name of the task that some targets expect."""


def known_columns() -> str:
    """Returns the recognised pairs of columns as text."""
    return ", ".join("/".join(pair) for pair in KNOWN)


def split_columns(data: str) -> tuple[str, Columns | None]:
    """Splits `data` into the name of the data and its columns, None if it has none."""
    name, at, columns = data.rpartition("@")
    parts = columns.split(",", 2)
    if not at or len(parts) < 2 or Path(data).exists():
        return data, None
    if not parts[0].strip() or not parts[1].strip():
        raise ValueError(f"{data}: expected a source column and a label column after @, as in @source,label")
    return name, Columns(source=parts[0].strip(), label=parts[1].strip(), prefix="".join(parts[2:]))


def infer_columns(row: Row, other_keys: Collection[str]) -> Columns | None:
    """Returns the recognised pair of columns of a row, None if it has none.

    A source without a label suffices if the row has none of `other_keys`, the keys of plain prompts.
    """
    for source, label in KNOWN:
        if source in row.fields and (label in row.fields or row.fields.keys().isdisjoint(other_keys)):
            return Columns(source=source, label=label)
    return None


def read_pair(row: Row, columns: Columns, *, with_label: bool) -> tuple[str, str]:
    """Returns (source, label) of a row, the label empty unless `with_label`; raises RowError if a text is missing."""
    check_row(row)
    found: list[str] = []
    for column in [columns.source, columns.label] if with_label else [columns.source]:
        if column not in row.fields:
            raise RowError(f"{row.where}: there is no column {column!r}; it has {', '.join(row.fields)}")
        value = row.fields[column]
        value = "" if value is None else value
        if not isinstance(value, str):
            raise RowError(f"{row.where}: `{column}` should be text, found {value!r:.40}")
        if not value.strip():
            raise RowError(f"{row.where}: `{column}` is empty")
        found.append(value)
    return columns.prefix + found[0], found[1] if with_label else ""


def label_ids(tokenizer: PreTrainedTokenizerBase, label: str) -> list[int]:
    """Returns the label's ids with the end token last."""
    ids = tokenizer(text_target=label, verbose=False)["input_ids"]
    end = tokenizer.eos_token_id
    return ids if end is None or ids[-1:] == [end] else [*ids, end]
