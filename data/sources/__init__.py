"""Reads sources of prompts: rows of JSONL, Parquet and `datasets`, or whole text documents.

A source is a file, a folder, `python-source` (held-out files of the pocket target), `python-source:train` (its training
files), `python-docstrings` or `python-docstrings:train` (the functions in these files with their summary lines), or a
name on the hub: `owner/name`, `owner/name:split` or `owner/name/configuration:split`.
"""

import ast
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from data import POCKET
from data.sources.python_source import SourceFile, docstring_pairs, source_files, split_files

PYTHON_SOURCE, PYTHON_DOCSTRINGS = "python-source", "python-docstrings"
ROW_SUFFIXES = (".jsonl", ".json", ".parquet")
BEGINNING = 160
"""Number of characters at the beginning of files that are compared to find near-duplicates."""
TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One record of a data file; `where` is `file:line` or `file:row`, numbered from 1."""

    where: str
    fields: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Document:
    """One text, from which prompts are cut; `name` is its path."""

    name: str
    text: str

    def starts(self) -> list[int]:
        """Returns the character offsets where a prompt may begin: 0, then functions (Python) or paragraphs."""
        return [0, *(_function_starts(self.text) if self.name.endswith(".py") else _paragraph_starts(self.text))]


def read_source(source: str) -> list[Row] | list[Document]:
    """Returns the rows or documents of `source` in file order; raises ValueError if it cannot be read."""
    if not source.strip():
        raise ValueError("no data given; name a file, a folder, a data set on the hub, or python-source")
    path = Path(source)
    if source.split(":")[0] == PYTHON_SOURCE:
        return _python_source(source)
    if source.split(":")[0] == PYTHON_DOCSTRINGS:
        return _python_docstrings(source)
    if path.is_dir():
        return _read_folder(path)
    if path.is_file():
        return _read_file(path)
    if looks_local(source):
        raise ValueError(f"no such file or folder: {source!r}")
    return _read_hub(source)


def looks_local(source: str) -> bool:
    """Returns whether `source` is a path rather than a name on the hub."""
    path = Path(source)
    if path.suffix in (*ROW_SUFFIXES, *TEXT_SUFFIXES) or source.startswith((".", "/", "~", "runs/")):
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


def _python_files(source: str) -> tuple[list[SourceFile], list[SourceFile]]:
    """Returns the pocket targets' training files and held-out files."""
    name, _, part = source.partition(":")
    if part not in ("", "held-out", "train"):
        raise ValueError(f"unknown part {part!r} in {source!r}; use {name} or {name}:train")
    card = POCKET / "pocket.json"
    made = json.loads(card.read_text())["settings"] if card.exists() else {}
    share, seed = made.get("held_out_share", 0.02), made.get("seed", 0)
    return split_files(source_files(), held_out_share=share, seed=seed)


def _read_folder(folder: Path) -> list[Row] | list[Document]:
    if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
        return _saved_dataset(folder)
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not _is_hidden(path.relative_to(folder))]
    rows = [row for path in files if path.suffix in ROW_SUFFIXES for row in _read_rows(path)]
    if rows:
        return rows
    documents = [_read_document(path) for path in files if path.suffix in TEXT_SUFFIXES]
    if not documents:
        known = " ".join((*ROW_SUFFIXES, *TEXT_SUFFIXES))
        raise ValueError(f"{folder} contains no data: expected a saved `datasets` folder or files ending in {known}")
    return documents


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _read_file(path: Path) -> list[Row] | list[Document]:
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty")
    return list(_read_rows(path)) if path.suffix in ROW_SUFFIXES else [_read_document(path)]


def _read_document(path: Path) -> Document:
    try:
        return Document(name=str(path), text=path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start})") from None


def _read_rows(path: Path) -> Iterable[Row]:
    if path.suffix == ".parquet":
        try:
            table = pyarrow.parquet.read_table(path)
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"{path} is not a complete Parquet file: {_first_line(error)}") from None
        values = table.to_pylist()
        return _numbered(path, values)
    if path.suffix == ".json":
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not valid JSON: {error}") from None
        if not isinstance(values, list):
            raise ValueError(f"{path} is not a list of objects; use .jsonl for one object per line")
        return _numbered(path, values)
    return _read_lines(path)


def _read_lines(path: Path) -> list[Row]:
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: not valid JSON: {error}") from None
        if not isinstance(fields, dict):
            raise ValueError(f'{path}, line {number}: expected an object like {{"prompt": ...}}, found {line[:40]!r}')
        rows.append(Row(where=f"{path}:{number}", fields=fields))
    return rows


def _numbered(origin: Path | str, values: Iterable[Any]) -> list[Row]:
    rows = []
    for number, fields in enumerate(values, start=1):
        if not isinstance(fields, dict):
            raise ValueError(f"{origin}, row {number}: expected an object, found {fields!r:.40}")
        rows.append(Row(where=f"{origin}:{number}", fields=fields))
    return rows


def _saved_dataset(folder: Path) -> list[Row]:
    import datasets  # imported here because it takes two seconds, which other sources do not need

    try:
        saved = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise ValueError(f"{folder} is not a readable `datasets` folder: {_first_line(error)}") from None
    if isinstance(saved, datasets.DatasetDict):
        if len(saved) > 1 and "train" not in saved:
            raise ValueError(f"{folder} has the splits {', '.join(saved)}; name one as {folder}/<split>")
        saved = saved["train"] if "train" in saved else next(iter(saved.values()))
    return _numbered(str(folder), saved)


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
    return _numbered(source, found)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _function_starts(text: str) -> list[int]:
    """Returns the offset of each function's first line, decorators included."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return []
    offsets = [0]
    for line in text.split("\n"):  # not splitlines(): ast does not count form feeds as line ends
        offsets.append(offsets[-1] + len(line) + 1)
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    lines = {min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]) for node in functions}
    return [offsets[line - 1] for line in sorted(lines) if line > 1]


def _paragraph_starts(text: str) -> list[int]:
    starts, position = [], 0
    for block in text.split("\n\n"):
        if position and block.strip():
            starts.append(position + len(block) - len(block.lstrip("\n")))
        position += len(block) + 2
    return starts
