"""What questions are made from: functions, passages and constants of the standard library, and pydoc's topics.

A document is one library file or one topic, and is wholly held out or wholly for training. Training pieces that share
a paragraph or a run of lines with a held-out piece are dropped, so that no text is in both parts.
"""

import ast
import hashlib
import io
import keyword
import re
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

from data.sources.python_source import SourceFile, source_files, split_files

HELD_OUT_SHARE = 0.1
NAME_PREFIXES_SKIPPED = ("stdlib/pydoc_data/", "stdlib/encodings/", "stdlib/_sysconfigdata", "stdlib/__phello__")
"""Generated files, a machine's own settings, and files that differ in tables alone."""
MIN_CODE, MAX_CODE = 150, 1_600
MIN_PASSAGE, MAX_PASSAGE = 280, 1_700
"""Numbers of characters."""
MIN_SHARED = 60
"""Shorter paragraphs and runs of lines, such as "Return a string.", may occur in both parts."""
SHARED_LINES = 3


@dataclass(frozen=True, kw_only=True)
class Function:
    """A function of a library file."""

    where: str
    """`file:line`."""
    name: str
    code: str
    """Source without decorators and docstring, not indented."""
    header: str
    """The line `def name(arguments):`."""
    docstring: str
    """Empty if it has none."""
    summary: str
    """The docstring's first line, empty if there is none."""
    arguments: tuple[str, ...]

    @property
    def text(self) -> str:
        return f"{self.code}\n\n{self.docstring}"

    @property
    def raised(self) -> list[str]:
        """Names of the exceptions in its raise statements."""
        return list(dict.fromkeys(re.findall(r"^\s*raise ([A-Z]\w+)", self.code, re.MULTILINE)))

    @property
    def calls(self) -> list[str]:
        """Names of the functions that it calls, without methods."""
        body = self.code.partition("\n")[2]
        found = dict.fromkeys(re.findall(r"(?<![.\w])([A-Za-z_]\w+)\(", body))
        return [name for name in found if not keyword.iskeyword(name)]


@dataclass(frozen=True, kw_only=True)
class Passage:
    """A part of a docstring or of a topic: whole paragraphs."""

    where: str
    """`file:line`, or the topic."""
    subject: str
    """What it documents, such as "the module shelve"."""
    text: str

    @property
    def sentences(self) -> list[str]:
        joined = " ".join(self.text.split())
        return [one for one in re.split(r"(?<=[a-z)\"'][.!?]) +(?=[A-Z])", joined) if 25 <= len(one) <= 240]


@dataclass(frozen=True, kw_only=True)
class Constant:
    """A whole number that a library file gives a name."""

    where: str
    module: str
    name: str
    value: int

    @property
    def text(self) -> str:
        return f"{self.name} = {self.value} in {self.module}"


Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
Piece = TypeVar("Piece", Function, Passage, Constant)


@dataclass(kw_only=True)
class Material:
    """The pieces of one part."""

    functions: list[Function] = field(default_factory=list)
    passages: list[Passage] = field(default_factory=list)
    constants: list[Constant] = field(default_factory=list)


def is_held_out(name: str, *, share: float = HELD_OUT_SHARE) -> bool:
    """Returns whether a document or a subject of this name is held out, by its hash alone."""
    return int.from_bytes(hashlib.sha256(f"0:{name}".encode()).digest()[:8], "big") / 2**64 < share


def read_material(files: list[SourceFile] | None = None) -> tuple[Material, Material]:
    """Returns the pieces of training documents and of held-out documents; `files` are by default the library's."""
    if files is None:
        files = [file for file in source_files(()) if not file.name.startswith(NAME_PREFIXES_SKIPPED)]
    train_files, held_out_files = split_files(files, held_out_share=HELD_OUT_SHARE)
    train, held_out = Material(), Material()
    for part, chosen in ((train, train_files), (held_out, held_out_files)):
        for file in chosen:
            _read_file(file, part)
    for name, text in _topics():
        part = held_out if is_held_out(name) else train
        part.passages += _passages(name, f"the topic `{name.rpartition('/')[2]}`", text)
    for part in (train, held_out):
        part.functions = _distinct(part.functions)
        part.passages = _distinct(part.passages)
        part.constants = _distinct(part.constants)
    texts = [piece.text for piece in held_out.functions] + [piece.text for piece in held_out.passages]
    shared = {one for text in texts for one in fingerprints(text)}
    train.functions = [piece for piece in train.functions if shared.isdisjoint(fingerprints(piece.text))]
    train.passages = [piece for piece in train.passages if shared.isdisjoint(fingerprints(piece.text))]
    known = {constant.text for constant in held_out.constants}
    train.constants = [constant for constant in train.constants if constant.text not in known]
    return train, held_out


def fingerprints(text: str) -> set[str]:
    """Returns a text's paragraphs and runs of lines that are long enough to compare, with single spaces."""
    paragraphs = [" ".join(block.split()) for block in re.split(r"\n\s*\n", text)]
    lines = [stripped for line in text.splitlines() if (stripped := line.strip())]
    runs = [" ".join(lines[at : at + SHARED_LINES]) for at in range(len(lines) - SHARED_LINES + 1)]
    return {found for found in (*paragraphs, *runs) if len(found) >= MIN_SHARED}


def _topics() -> list[tuple[str, str]]:
    from pydoc_data import topics  # half a megabyte of text, which other sources do not need

    return [(f"topics/{name}", text) for name, text in sorted(topics.topics.items())]


def _read_file(file: SourceFile, into: Material) -> None:
    try:
        tree = ast.parse(file.text)
    except (SyntaxError, ValueError):
        return
    module = file.name.removeprefix("stdlib/").removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    lines = io.StringIO(file.text).readlines()  # not splitlines(): ast does not count form feeds as line ends
    documented: list[tuple[ast.Module | Definition, str]] = [(tree, f"the module `{module}`")]
    for node in _definitions(tree.body):
        if isinstance(node, ast.ClassDef):
            documented.append((node, f"the class `{node.name}` of the module `{module}`"))
        else:
            documented.append((node, f"the function `{node.name}` of the module `{module}`"))
            into.functions += _function(node, lines, file.name)
    for documented_node, subject in documented:
        where = f"{file.name}:{getattr(documented_node, 'lineno', 1)}"
        into.passages += _passages(where, subject, ast.get_docstring(documented_node) or "")
    into.constants += _constants(tree, module, file.name)


def _definitions(statements: list[ast.stmt]) -> Iterator[Definition]:
    """Yields classes and functions, nested ones too, ten times as fast as ast.walk, which visits every expression."""
    for statement in statements:
        if isinstance(statement, Definition):
            yield statement
        for name in ("body", "orelse", "finalbody", "handlers"):
            yield from _definitions(getattr(statement, name, []))


def _function(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str], name: str) -> Iterator[Function]:
    """Yields the function if its length suits a question."""
    docstring = (ast.get_docstring(node) or "").strip()
    if docstring and len(node.body) < 2:
        return
    body = lines[node.lineno - 1 : node.end_lineno]
    if docstring:
        first = node.body[0]
        body = lines[node.lineno - 1 : first.lineno - 1] + lines[first.end_lineno : node.end_lineno]
    code = textwrap.dedent("".join(body)).strip()
    if not MIN_CODE <= len(code) <= MAX_CODE or not code.startswith(("def ", "async def ")):
        return
    every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    summary = docstring.split("\n")[0].strip()
    yield Function(
        where=f"{name}:{node.lineno}",
        name=node.name,
        code=code,
        header=f"def {node.name}({ast.unparse(node.args)}):",
        docstring=docstring if len(docstring) <= MAX_PASSAGE else "",
        summary=summary if 3 <= len(summary.split()) <= 30 else "",
        arguments=tuple(argument.arg for argument in every if argument.arg not in ("self", "cls")),
    )


def _passages(where: str, subject: str, text: str) -> Iterator[Passage]:
    """Yields runs of whole paragraphs of a text, numbered after a #, without those that are mostly not prose."""
    if len(text) < MIN_PASSAGE:
        return
    number = 0
    run: list[str] = []
    for block in [*re.split(r"\n\s*\n", text), ""]:
        block = block.strip("\n")
        length = sum(map(len, run)) + 2 * len(run)
        if run and (not block or length + len(block) > MAX_PASSAGE):
            joined = textwrap.dedent("\n\n".join(run)).strip()
            run = []
            if len(joined) >= MIN_PASSAGE and sum(map(str.isalpha, joined)) > 0.65 * len(joined):
                yield Passage(where=f"{where}#{number}" if number else where, subject=subject, text=joined)
                number += 1
        if block and len(block) <= MAX_PASSAGE:
            run.append(block)


def _constants(tree: ast.Module, module: str, file: str) -> Iterator[Constant]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            value = node.value.value if isinstance(node.value, ast.Constant) else None
            name = node.targets[0].id
            if type(value) is int and 3 <= value <= 100_000 and name.isupper() and len(name) > 2:
                yield Constant(where=f"{file}:{node.lineno}", module=module, name=name, value=value)


def _distinct(pieces: Iterable[Piece]) -> list[Piece]:
    return list({" ".join(piece.text.split()): piece for piece in pieces}.values())
