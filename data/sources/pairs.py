"""Rows for encoder-decoders: which column is read, which one is to be written, and both as token ids."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from data.sources import Row

KNOWN = (("article", "highlights"), ("document", "summary"), ("source", "target"), ("text", "summary"))
"""Columns told by their names, as those of CNN/DailyMail, XSum and most others are."""


@dataclass(frozen=True, kw_only=True)
class Columns:
    """What a user says of the rows, as in `owner/name@body,title` or `pairs.jsonl@en,de,translate to German: `."""

    source: str
    """Column that the encoder reads."""
    label: str
    """Column that is to be written."""
    prefix: str = ""
    """Stands before every source, as some targets want their task to be named."""


def in_words() -> str:
    """Returns the columns known by name."""
    return ", ".join("/".join(pair) for pair in KNOWN)


def split_columns(data: str) -> tuple[str, Columns | None]:
    """Returns what `data` names without its columns, and these, None if it says nothing of them."""
    name, at, said = data.rpartition("@")
    parts = said.split(",", 2)
    if not at or len(parts) < 2 or Path(data).exists():
        return data, None
    if not parts[0].strip() or not parts[1].strip():
        raise ValueError(f"{data}: after @ two columns are named, that of the source and that of the label, as @a,b")
    return name, Columns(source=parts[0].strip(), label=parts[1].strip(), prefix="".join(parts[2:]))


def columns_of(row: Row, understood: Collection[str]) -> Columns | None:
    """Returns a row's columns as their names tell, None where they tell of no pair.

    A source without a label will do where the row has none of the `understood` keys of other prompts.
    """
    for source, label in KNOWN:
        if source in row.fields and (label in row.fields or row.fields.keys().isdisjoint(understood)):
            return Columns(source=source, label=label)
    return None


def with_text(rows: list[Row], columns: Columns, *, with_labels: bool) -> list[Row]:
    """Returns the rows whose source, and label if wanted, is not empty, and says how many are left out.

    Raises ValueError where a column is missing, or holds no text.
    """
    wanted = [columns.source, columns.label] if with_labels else [columns.source]
    kept = []
    for row in rows:
        for column in wanted:
            if column not in row.fields:
                raise ValueError(f"{row.where}: there is no column {column!r}; it has {', '.join(row.fields)}")
            if not isinstance(value := row.fields[column], str | None):
                raise ValueError(f"{row.where}: `{column}` should be text, found {value!r:.40}")
        if all((row.fields[column] or "").strip() for column in wanted):
            kept.append(row)
    if len(kept) < len(rows):
        print(f"{len(rows) - len(kept)} of {len(rows)} rows have nothing in `{'` or `'.join(wanted)}` and are left out")
    return kept


def label_ids(tokenizer: PreTrainedTokenizerBase, label: str) -> list[int]:
    """Returns the label's ids as a decoder learns to write them, the token that ends a text last."""
    ids = tokenizer(text_target=label, verbose=False)["input_ids"]
    end = tokenizer.eos_token_id
    return ids if end is None or ids[-1:] == [end] else [*ids, end]
