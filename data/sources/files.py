"""Reads data files: JSON, JSON lines, CSV, TSV and Parquet as rows, others as text; compressed ones too."""

import codecs
import csv
import io
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from data.sources.records import Document, Row

LINE_SUFFIXES = (".jsonl", ".ndjson")
TABLE_SUFFIXES = {".csv": ",", ".tsv": "\t"}
"""Delimiters of tables by file suffix."""
ROW_SUFFIXES = (*LINE_SUFFIXES, ".json", ".parquet", *TABLE_SUFFIXES)
TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")
COMPRESSED_SUFFIXES = (".gz", ".zst", ".bz2")
BYTE_ORDER_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
"""Encodings by the first bytes of a file. That of UTF-32 begins with that of UTF-16, and comes first."""


def data_suffix(path: Path) -> str:
    """Returns the suffix of a file's format, without that of its compression."""
    return Path(path.stem).suffix if path.suffix in COMPRESSED_SUFFIXES else path.suffix


def read_folder(folder: Path) -> list[Row] | list[Document]:
    """Returns the rows of all files with rows in a folder, or its documents if there are none."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not _is_hidden(path.relative_to(folder))]
    rows = [row for path in files if data_suffix(path) in ROW_SUFFIXES for row in _read_rows(path)]
    if rows:
        return rows
    documents = [_read_document(path) for path in files if data_suffix(path) in TEXT_SUFFIXES]
    if not documents:
        known = " ".join((*ROW_SUFFIXES, *TEXT_SUFFIXES))
        raise ValueError(f"{folder} contains no data: expected a saved `datasets` folder or files ending in {known}")
    return documents


def read_file(path: Path) -> list[Row] | list[Document]:
    """Returns the rows of a file, or the document that it is."""
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty")
    return _read_rows(path) if data_suffix(path) in ROW_SUFFIXES else [_read_document(path)]


def numbered_rows(origin: Path | str, values: Iterable[Any]) -> list[Row]:
    """Returns records as rows, numbered from 1."""
    return [_row(f"{origin}:{number}", fields) for number, fields in enumerate(values, start=1)]


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _read_bytes(path: Path) -> bytes:
    if path.suffix not in COMPRESSED_SUFFIXES:
        return path.read_bytes()
    try:
        with pyarrow.input_stream(str(path)) as stream:
            return stream.read()
    except (pyarrow.ArrowException, OSError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} is not a complete {path.suffix} file: {reason}") from None


def _read_utf8(path: Path) -> bytes:
    """Returns the bytes of a text file in UTF-8 without its mark, from the encoding that the mark tells."""
    content = _read_bytes(path).removeprefix(codecs.BOM_UTF8)
    encoding = next((name for mark, name in BYTE_ORDER_MARKS.items() if content.startswith(mark)), None)
    if encoding is None and b"\0" in content[:4]:
        raise ValueError(f"{path} begins with zero bytes, as UTF-16 text without a mark does: save it as UTF-8")
    if encoding is None:
        return content
    try:
        return content.decode(encoding).encode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not {encoding} text, as its first bytes say (byte {error.start})") from None


def _read_text(path: Path) -> str:
    try:
        return _read_utf8(path).decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start})") from None


def _read_document(path: Path) -> Document:
    text = _read_text(path)
    if "\0" in text:
        raise ValueError(f"{path} is not text: it has zero bytes; name a file of text, or of {' '.join(ROW_SUFFIXES)}")
    return Document(name=str(path), text=io.StringIO(text, newline=None).read())


def _read_rows(path: Path) -> list[Row]:
    suffix = data_suffix(path)
    if suffix == ".parquet":
        try:
            is_packed = path.suffix in COMPRESSED_SUFFIXES
            table = pyarrow.parquet.read_table(pyarrow.BufferReader(_read_bytes(path)) if is_packed else path)
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"{path} is not a complete Parquet file: {str(error).splitlines()[0]}") from None
        return _table_rows(path, table)
    if suffix in TABLE_SUFFIXES:
        return _read_table(path, TABLE_SUFFIXES[suffix])
    return _read_json(path) if suffix == ".json" else _read_lines(path, _read_utf8(path))


def _table_rows(path: Path, table: pyarrow.Table) -> list[Row]:
    """Returns the rows of an Arrow table, without columns of dates and times, which can hold what Python cannot."""
    names = [field.name for field in table.schema if not pyarrow.types.is_temporal(field.type)]
    table = table.select(names)
    try:
        return numbered_rows(path, table.to_pylist())
    except (pyarrow.ArrowException, OverflowError, ValueError):
        return [_table_row(f"{path}:{number + 1}", table.slice(number, 1)) for number in range(len(table))]


def _table_row(where: str, table: pyarrow.Table) -> Row:
    try:
        return _row(where, table.to_pylist()[0])
    except (pyarrow.ArrowException, OverflowError, ValueError) as error:
        return Row(where=where, fields={}, fault=f"{where}: it cannot be read: {str(error).splitlines()[0]}")


def _read_json(path: Path) -> list[Row]:
    content = _read_utf8(path)
    try:
        values = json.loads(content.decode())
    except (ValueError, RecursionError) as error:
        rows = _read_lines(path, content)
        if any(not row.fault for row in rows):
            return rows
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if isinstance(values, dict) and content.strip().count(b"\n") == 0:
        values = [values]
    if not isinstance(values, list):
        raise ValueError(f"{path} is not a list of objects; use .jsonl for one object per line")
    return numbered_rows(path, values)


def _read_lines(path: Path, content: bytes) -> list[Row]:
    rows = []
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line.decode())  # bytes with zeros would be taken for UTF-16
        except (ValueError, RecursionError) as error:
            rows.append(Row(where=f"{path}:{number}", fields={}, fault=f"{path}:{number}: not valid JSON: {error}"))
        else:
            rows.append(_row(f"{path}:{number}", fields))
    return rows


def _read_table(path: Path, delimiter: str) -> list[Row]:
    """Returns the rows of a table, whose first line names the columns; an empty cell counts as missing."""
    csv.field_size_limit(sys.maxsize)
    # Strict: else a quotation mark that is not closed would take in the rows after it.
    reader = csv.reader(io.StringIO(_read_text(path), newline=""), delimiter=delimiter, strict=True)
    header, rows, begin = None, list[Row](), 1
    while True:
        where = f"{path}:{begin}"
        try:
            cells = next(reader, None)
        except csv.Error as error:
            if header is None or "end of data" in str(error):
                raise ValueError(f"{where}: a cell begins with a quotation mark that is not closed") from None
            cells = []
            rows.append(Row(where=where, fields={}, fault=f"{where}: {error}"))
        begin = reader.line_num + 1
        if cells is None:
            return rows
        if header is None:
            header = cells
            if repeated := [name for name in header if header.count(name) > 1]:
                raise ValueError(f"{path} has {header.count(repeated[0])} columns called {repeated[0]!r}; rename them")
            continue
        if not cells:
            continue
        fault = f"{where}: found {len(cells)} cells, expected {len(header)}" if len(cells) != len(header) else ""
        fields = {name: cell for name, cell in zip(header, cells, strict=False) if cell}
        rows.append(Row(where=where, fields=fields, fault=fault))


def _row(where: str, fields: Any) -> Row:
    if isinstance(fields, dict):
        return Row(where=where, fields=fields)
    return Row(
        where=where, fields={}, fault=f'{where}: expected an object like {{"prompt": ...}}, found {fields!r:.40}'
    )
