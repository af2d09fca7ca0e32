"""Reads sources of prompts: rows of JSON, CSV, Parquet and `datasets`, or whole text documents.

A source is a file, a folder, `python-source` (held-out files of the pocket target), `python-source:train` (its training
files), `python-docstrings` or `python-docstrings:train` (the functions in these files with their summary lines),
`python-questions` or `python-questions:train` (questions to an assistant, see data/sources/questions), or a name on the
hub: `owner/name`, `owner/name:split` or `owner/name/configuration:split`.
"""

import json
import os
from functools import cache
from pathlib import Path

from data import POCKET
from data.sources.files import ROW_SUFFIXES, TEXT_SUFFIXES, data_suffix, numbered_rows, read_file, read_folder
from data.sources.python_source import SourceFile, docstring_pairs, source_files, split_files
from data.sources.questions import question_rows
from data.sources.records import Document, LeftOut, Row, RowError
from draftsmith.loading.text_files import kind_of

__all__ = [
    "BEGINNING",
    "PYTHON_QUESTIONS",
    "Document",
    "LeftOut",
    "Row",
    "RowError",
    "default_source",
    "looks_local",
    "read_source",
]

PYTHON_SOURCE, PYTHON_DOCSTRINGS, PYTHON_QUESTIONS = "python-source", "python-docstrings", "python-questions"
BEGINNING = 160
"""Number of characters at the beginning of files that are compared to find near-duplicates."""


def read_source(source: str) -> list[Row] | list[Document]:
    """Returns the rows or documents of `source` in file order; raises ValueError if it cannot be read."""
    if not source.strip():
        raise ValueError(
            "no data given; name a file, a folder, a data set on the hub, python-questions or python-source"
        )
    path = Path(source)
    kind = kind_of(path)  # raises ValueError for what cannot be a name
    if source.split(":")[0] == PYTHON_SOURCE:
        return _python_source(source)
    if source.split(":")[0] == PYTHON_DOCSTRINGS:
        return _python_docstrings(source)
    if source.split(":")[0] == PYTHON_QUESTIONS:
        _check_part(source)
        return question_rows(held_out=not _is_train(source))
    if kind == "device":
        raise ValueError(f"{source} is no file or folder; name one with data")
    if path.is_dir():
        return _saved_dataset(path) if _is_saved_dataset(path) else read_folder(path)
    if path.is_file():
        return read_file(path)
    if looks_local(source):
        raise ValueError(f"no such file or folder: {source!r}")
    return _read_hub(source)


def looks_local(source: str) -> bool:
    """Returns whether `source` is a path rather than a name on the hub."""
    path = Path(source)
    if data_suffix(path) in (*ROW_SUFFIXES, *TEXT_SUFFIXES) or source.startswith((".", "/", "~", "runs/")):
        return True
    return source.count("/") > 2 or ("/" in source and path.parent.is_dir())


def default_source(part: str, *, is_encoder_decoder: bool) -> str:
    """Returns the source that needs no data files, pairs for an encoder-decoder; `part` is "" (held out) or "train"."""
    name = PYTHON_DOCSTRINGS if is_encoder_decoder else PYTHON_SOURCE
    return f"{name}:{part}" if part else name


def _python_source(source: str) -> list[Document]:
    train, held_out = _python_files(source)
    # Generated files share their beginnings; a prompt from one would be memorised.
    known = {file.text[:BEGINNING] for file in train}
    held_out = [file for file in held_out if file.text[:BEGINNING] not in known]
    return [Document(name=file.name, text=file.text) for file in (train if _is_train(source) else held_out)]


def _python_docstrings(source: str) -> list[Row]:
    return list(_docstring_rows(source))


@cache  # parsing thousands of files is slow
def _docstring_rows(source: str) -> tuple[Row, ...]:
    train, held_out = _python_files(source)
    # A function that is also in a training file would be memorised.
    known = set() if _is_train(source) else {function for function, _ in docstring_pairs(train)}
    return tuple(
        Row(where=f"{file.name}:{number}", fields={"source": function, "target": summary})
        for file in (train if _is_train(source) else held_out)
        for number, (function, summary) in enumerate(docstring_pairs([file]), start=1)
        if function not in known
    )


def _is_train(source: str) -> bool:
    return source.endswith(":train")


def _check_part(source: str) -> None:
    name, _, part = source.partition(":")
    if part not in ("", "held-out", "train"):
        raise ValueError(f"unknown part {part!r} in {source!r}; use {name} or {name}:train")


def _python_files(source: str) -> tuple[list[SourceFile], list[SourceFile]]:
    """Returns the pocket targets' training files and held-out files."""
    _check_part(source)
    card = POCKET / "pocket.json"
    made = json.loads(card.read_text())["settings"] if card.exists() else {}
    share, seed = made.get("held_out_share", 0.02), made.get("seed", 0)
    return split_files(source_files(), held_out_share=share, seed=seed)


def _is_saved_dataset(folder: Path) -> bool:
    return (folder / "dataset_dict.json").exists() or (folder / "state.json").exists()


def _saved_dataset(folder: Path) -> list[Row]:
    import datasets  # imported here because it takes two seconds, which other sources do not need

    try:
        saved = datasets.load_from_disk(str(folder))
    except Exception as error:  # of many kinds, for files that are missing or wrong
        raise ValueError(f"{folder} is not a readable `datasets` folder: {_first_line(error)}") from None
    if isinstance(saved, datasets.DatasetDict):
        if len(saved) > 1 and "train" not in saved:
            raise ValueError(f"{folder} has the splits {', '.join(saved)}; name one as {folder}/<split>")
        saved = saved["train"] if "train" in saved else next(iter(saved.values()))
    return numbered_rows(folder, saved)


def _read_hub(source: str) -> list[Row]:
    if os.environ.get("DRAFTSMITH_OFFLINE") == "1":
        raise ValueError(f"{source!r} is no local file or folder, and DRAFTSMITH_OFFLINE=1 disables access to the hub")
    import datasets  # imported here: see _saved_dataset

    name, _, split = source.partition(":")
    owner_and_name, configuration = name, None
    if name.count("/") == 2:
        owner_and_name, _, configuration = name.rpartition("/")
    try:
        found = datasets.load_dataset(owner_and_name, configuration, split=split or "train")
    except Exception as error:  # the hub's client raises many kinds of exceptions
        reason = _first_line(error)
        raise ValueError(
            f"{source!r} is no local file or folder and cannot be loaded from the hub: {reason}"
        ) from error
    return numbered_rows(source, found)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
