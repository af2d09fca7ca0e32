"""The records of data files, `Row` and `Document`, and the count of those that cannot be used."""

import ast
import json
from dataclasses import dataclass
from typing import Any

NUM_NAMED = 3
"""Number of rows left out that a message names."""


class RowError(ValueError):
    """A row that cannot be used; the message names its file and line."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One record of a data file; `where` is `file:line` or `file:row`, numbered from 1."""

    where: str
    fields: dict[str, Any]
    fault: str = ""
    """Why the record could not be read, with file and line; empty if it could."""


@dataclass(frozen=True, kw_only=True)
class Document:
    """One text, from which prompts are cut; `name` is its path."""

    name: str
    text: str

    def starts(self) -> list[int]:
        """Returns the character offsets where a prompt may begin: 0, then functions (Python) or paragraphs."""
        return [0, *(_function_starts(self.text) if self.name.endswith(".py") else _paragraph_starts(self.text))]


def check_row(row: Row) -> None:
    """Raises RowError for a row that could not be read, or whose text no tokenizer accepts."""
    if row.fault:
        raise RowError(row.fault)
    try:
        json.dumps(row.fields, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as error:
        code = f"\\u{ord(error.object[error.start]):04x}"
        raise RowError(f"{row.where}: the text contains half a character, {code}, of a pair") from None


class LeftOut:
    """Counts the rows that are left out, with the reasons of the first."""

    def __init__(self) -> None:
        self.num_rows = 0
        self.reasons: list[str] = []

    def add(self, reason: object) -> None:
        self.num_rows += 1
        if len(self.reasons) < NUM_NAMED:
            self.reasons.append(str(reason))

    def report(self, source: str, num_rows: int, max_share: float) -> None:
        """Prints how many of `num_rows` rows are left out; raises ValueError for all, or more than `max_share`."""
        if not self.num_rows:
            return
        more = self.num_rows - len(self.reasons)
        reasons = "; ".join([*self.reasons, *([f"and {more:,} more"] if more else [])])
        counted = f"{source}: {self.num_rows:,} of {num_rows:,} rows cannot be used ({reasons})"
        if self.num_rows == num_rows:
            raise ValueError(f"{counted}; none is left")
        if self.num_rows > max_share * num_rows:
            raise ValueError(
                f"{counted}; at most a share of {max_share:g} may be left out: correct the rows, or raise "
                "--max-left-out (1 leaves out any number)"
            )
        print(f"{counted} and are left out")


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
