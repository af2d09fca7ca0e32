"""Questions made from the library: every kind, nothing of a held-out document in training, the same each time."""

import hashlib
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator

import pytest

from data.prompts import load_prompts
from data.sources import Row, questions, read_source
from data.sources.python_source import SourceFile, source_files
from data.sources.questions.material import Material, fingerprints, is_held_out, read_material
from tests.support.runs import environment
from tests.support.text import CHAT_TEMPLATE, trained_tokenizer


@pytest.fixture(scope="module")
def files() -> list[SourceFile]:
    """A quarter of the library, in which files are held out as in the whole."""
    wanted = ("stdlib/a", "stdlib/c", "stdlib/f", "stdlib/s")
    return [file for file in source_files(()) if file.name.startswith(wanted)]


@pytest.fixture(scope="module")
def material(files) -> tuple[Material, Material]:
    return read_material(files)


@pytest.fixture(scope="module")
def parts(material) -> Iterator[tuple[list[Row], list[Row]]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(questions, "NUM_TRAIN", 50)
        yield questions.make_questions(*material)


def texts(rows: list[Row]) -> list[str]:
    return [row.fields["turns"][0] for row in rows]


def document(row: Row) -> str:
    """Returns the file, the topic, the subject or the puzzle that a row is about."""
    return row.where.rpartition(" (")[0].partition("#")[0].partition(":")[0]


def test_questions_are_of_every_kind_and_distinct(parts):
    for rows, at_least in zip(parts, (20, 3), strict=True):
        counted = Counter(row.fields["category"] for row in rows)
        assert counted.keys() == {kind.name for kind in questions.KINDS} and len(counted) >= 25
        assert min(counted.values()) >= at_least, counted
    assert len(set(texts(parts[0]) + texts(parts[1]))) == len(parts[0]) + len(parts[1])


def test_questions_have_system_prompts_and_later_turns_in_part(parts):
    for rows in parts:
        with_system = sum("system" in row.fields for row in rows) / len(rows)
        several = sum(len(row.fields["turns"]) > 1 for row in rows) / len(rows)
        assert 0.25 < with_system < 0.45 and 0.15 < several < 0.35
        assert {len(row.fields["turns"]) for row in rows} == {1, 2, 3}
        assert all(len(set(row.fields["turns"])) == len(row.fields["turns"]) for row in rows)


def test_no_document_and_no_text_of_one_is_in_both_parts(parts, material):
    train, held_out = parts
    assert {document(row) for row in train}.isdisjoint({document(row) for row in held_out})
    pieces = [(*part.functions, *part.passages) for part in material]
    found = [{one for piece in part for one in fingerprints(piece.text)} for part in pieces]
    assert len(found[0]) > 2_000 and len(found[1]) > 200 and found[0].isdisjoint(found[1])
    subjects = {document(row) for row in (*train, *held_out) if row.where.startswith("everyday/")}
    assert {name for name in subjects if is_held_out(name)} == subjects & {document(row) for row in held_out}


def test_text_shared_with_a_held_out_file_is_left_out_of_training(files):
    names = (f"stdlib/made_{number}.py" for number in range(1_000))
    held_out_name = next(name for name in names if is_held_out(name))
    shared = (
        "def area(width, height):\n"
        '    """Return the area of a rectangle."""\n'
        "    if width < 0 or height < 0:\n"
        '        raise ValueError("a rectangle has no negative sides: %r, %r" % (width, height))\n'
        "    product_of_both_sides = width * height\n"
        "    return product_of_both_sides\n"
    )
    copy = SourceFile(name="stdlib/made_copy.py", text=files[0].text + "\n\n" + shared)
    assert not is_held_out(copy.name)
    # Of a smaller held-out file the copy would share so much that it were left out as a whole.
    original = SourceFile(name=held_out_name, text="".join(f"value_{at} = {at}\n" for at in range(90)) + shared)
    (alone, _), (together, held_out) = (read_material(chosen) for chosen in ([copy], [copy, original]))
    assert "area" in {function.name for function in alone.functions}
    assert "area" not in {function.name for function in together.functions} and together.functions
    assert [function.name for function in held_out.functions] == ["area"]


def test_functions_are_read_without_their_docstrings():
    text = (
        "class Shelf:\n"
        "    @property\n"
        "    async def find(self, title, *, at_most=3):\n"
        '        """Return the books with this title.\n\n        More of it.\n        """\n'
        "        if not title:\n"
        '            raise ValueError("a title is needed to find a book on the shelf")\n'
        "        found = sorted(book for book in self.books if str(book.title) == title)\n"
        "        return found[:at_most]\n"
    )
    (material, _) = read_material([SourceFile(name="stdlib/shelf.py", text=text)])
    (find,) = material.functions
    assert find.code.startswith("async def find(self, title, *, at_most=3):\n    if not title:\n        raise")
    assert (find.summary, find.docstring) == (
        "Return the books with this title.",
        "Return the books with this title.\n\nMore of it.",
    )
    assert (find.where, find.arguments, find.raised) == ("stdlib/shelf.py:3", ("title", "at_most"), ["ValueError"])
    assert find.calls == ["ValueError", "sorted", "str"]


def test_load_prompts_puts_questions_into_the_chat_format(parts, monkeypatch):
    monkeypatch.setattr(questions, "_of_library", lambda: parts)
    rows = {row.where: row.fields for row in read_source("python-questions:train")}
    assert len(rows) == len(parts[0])
    prompts = load_prompts("python-questions:train", trained_tokenizer(CHAT_TEMPLATE), max_prompts=40, seed=1)
    assert len({prompt.category for prompt in prompts}) > 20
    for prompt in prompts:
        fields = rows[prompt.source]
        system = f"<|system|>{fields['system']}<eos>\n" if "system" in fields else ""
        assert prompt.text == f"{system}<|user|>{fields['turns'][0]}<eos>\n<|assistant|>"
    (first,) = load_prompts("python-questions", trained_tokenizer(), max_prompts=1)
    assert first.text.endswith(next(row for row in parts[1] if row.where == first.source).fields["turns"][0])


def test_questions_without_answers_cannot_be_learnt(parts, monkeypatch):
    monkeypatch.setattr(questions, "_of_library", lambda: parts)
    with pytest.raises(ValueError, match=r"has questions without answers; .* recipes/pseudo_data.py"):
        load_prompts("python-questions:train", trained_tokenizer(CHAT_TEMPLATE), keep_answers=True)
    with pytest.raises(ValueError, match=r"unknown part 'test' in 'python-questions:test'"):
        read_source("python-questions:test")


@pytest.mark.slow
def test_the_library_gives_the_same_thousands_of_questions_in_each_process():
    """A set of texts has another order in each process."""
    train, held_out = (questions.question_rows(held_out=flag) for flag in (False, True))
    assert len(train) >= 5_000 and len(held_out) >= 500
    assert min(Counter(row.fields["category"] for row in train).values()) >= 100
    script = (
        "from data.sources.questions import question_rows; import hashlib; "
        "rows = [question_rows(held_out=flag) for flag in (False, True)]; "
        "print(hashlib.sha256(repr(rows).encode()).hexdigest())"
    )
    words = [sys.executable, "-c", script]
    other = subprocess.run(words, env=environment(), capture_output=True, text=True, check=True).stdout
    assert other.strip() == hashlib.sha256(repr([train, held_out]).encode()).hexdigest()
