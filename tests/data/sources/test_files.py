"""Data files: compressed ones, tables, JSON lines under other names, and rows that cannot be read."""

import bz2
import codecs
import gzip
import json
import struct
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from data.prompts import TextSettings, load_prompts
from data.sources import Document, Row, read_source
from tests.support.text import trained_tokenizer

ROWS = [{"instruction": "Translate to French.", "input": f"sea {number}", "output": "mer"} for number in range(3)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
TABLE = 'instruction,input,output\nTranslate to French.,sea 0,mer\n"Translate to\nFrench, please.",sea 1,\n'


def zstd(content: bytes) -> bytes:
    return pyarrow.compress(content, codec="zstd", asbytes=True)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.jsonl.gz", gzip.compress(LINES)),
        ("rows.jsonl.zst", zstd(LINES)),
        ("rows.ndjson.bz2", bz2.compress(LINES)),
        ("rows.ndjson", LINES),
        ("rows.json", LINES),
        ("rows.json.gz", gzip.compress(json.dumps(ROWS).encode())),
        ("rows.jsonl", b"\xef\xbb\xbf" + LINES),
        ("rows.jsonl", LINES.decode().encode("utf-16")),
        ("rows.json", codecs.BOM_UTF16_BE + json.dumps(ROWS).encode("utf-16-be")),
        (
            "rows.csv",
            ("instruction,input,output\n" + "".join(f"Translate to French.,sea {n},mer\n" for n in range(3))).encode(
                "utf-32"
            ),
        ),
        (
            "rows.csv",
            b"instruction,input,output\n" + b"".join(b"Translate to French.,sea %d,mer\n" % n for n in range(3)),
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",  # gzip writes the time, which differs between processes
)
def test_read_source_reads_compressed_files_and_tables_as_rows(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    for source in (tmp_path / name, tmp_path):
        assert [row.fields for row in read_source(str(source))] == ROWS


def test_read_source_decompresses_texts(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"some text"))
    assert read_source(str(tmp_path)) == [Document(name=str(tmp_path / "a.txt.gz"), text="some text")]


@pytest.mark.parametrize(("name", "table"), [("rows.csv", TABLE), ("rows.tsv", TABLE.replace(",", "\t"))])
def test_table_rows_have_the_line_where_they_begin(tmp_path: Path, name: str, table: str) -> None:
    (tmp_path / name).write_text(table + "one cell\nlast,,x\n".replace(",", "," if name.endswith("csv") else "\t"))
    rows = read_source(str(tmp_path / name))
    assert [row.where.rpartition(":")[2] for row in rows] == ["2", "3", "5", "6"]
    assert rows[1].fields["instruction"].startswith("Translate to\nFrench") and "output" not in rows[1].fields
    assert rows[2].fault.endswith(f"{name}:5: found 1 cells, expected 3")
    assert rows[3].fields == {"instruction": "last", "output": "x"}


def test_load_prompts_leaves_out_a_few_rows_that_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    bad = ['{"prompt": "cut o', '{"prompt": ""}', "[]", '{"messages": []}', '{"prompt": "\xff"}']
    lines = [json.dumps({"prompt": f"good {number}"}) for number in range(6)]
    path = tmp_path / "rows.jsonl"
    path.write_bytes("\n".join([lines[0], *bad, *lines[1:]]).encode("latin-1"))
    prompts = load_prompts(str(path), trained_tokenizer())
    assert [prompt.text for prompt in prompts] == [f"good {number}" for number in range(6)]
    printed = capsys.readouterr().out
    assert "5 of 11 rows cannot be used" in printed
    for reason in (
        "rows.jsonl:2: not valid JSON",
        "rows.jsonl:3: `prompt` is empty",
        "rows.jsonl:4: expected an object",
    ):
        assert reason in printed
    assert "rows.jsonl:5" not in printed and "and 2 more" in printed
    with pytest.raises(ValueError, match=r"5 of 11 rows cannot be used .*at most a share of 0.2 may.*--max-left-out"):
        load_prompts(str(path), trained_tokenizer(), settings=TextSettings(max_left_out=0.2))
    path.write_bytes("\n".join([lines[0], *bad]).encode("latin-1"))
    with pytest.raises(ValueError, match=r"5 of 6 rows cannot be used"):
        load_prompts(str(path), trained_tokenizer())
    assert len(load_prompts(str(path), trained_tokenizer(), settings=TextSettings(max_left_out=1.0))) == 1
    path.write_bytes("\n".join(bad).encode("latin-1"))
    with pytest.raises(ValueError, match=r"5 of 5 rows cannot be used .*none is left"):
        load_prompts(str(path), trained_tokenizer(), settings=TextSettings(max_left_out=1.0))


def test_half_a_surrogate_pair_is_no_text(tmp_path: Path) -> None:
    """As in JSON whose text was cut within an emoji."""
    (tmp_path / "rows.jsonl").write_text('{"prompt": "cut \\ud83d"}\n')
    with pytest.raises(ValueError, match=r"rows.jsonl:1: the text contains half a character, \\ud83d"):
        load_prompts(str(tmp_path / "rows.jsonl"), trained_tokenizer())


def test_read_source_names_a_truncated_archive(tmp_path: Path) -> None:
    for name, content in (("rows.jsonl.gz", gzip.compress(LINES)), ("rows.jsonl.zst", zstd(LINES))):
        (tmp_path / name).write_bytes(content[:-9])
        with pytest.raises(ValueError, match=rf"{name} is not a complete \.\w+ file"):
            read_source(str(tmp_path / name))
    (tmp_path / "latin.csv").write_bytes(b"prompt\nna\xefve\n")
    with pytest.raises(ValueError, match=r"latin.csv is not UTF-8 text \(byte 9\)"):
        read_source(str(tmp_path / "latin.csv"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.csv",
            b'prompt\n"not closed\nnext row\n',
            "a.csv:2: a cell begins with a quotation mark that is not closed",
        ),
        ("a.csv", b"prompt,prompt\na,b\n", "a.csv has 2 columns called 'prompt'; rename them"),
        ("a.json", b"[" * 100_000, "a.json is not valid JSON: maximum recursion depth"),
        ("a.txt", b"PK\3\4\0\0", "a.txt is not text: it has zero bytes"),
        (
            "a.jsonl",
            '{"prompt": "a"}\n{"prompt": "b"}'.encode("utf-16-le"),
            "a.jsonl begins with zero bytes, as UTF-16",
        ),
        ("a.json", b'\xff\xfe{"a', "a.json is not utf-16 text, as its first bytes say"),
        ("x" * 300, b"", "cannot be the name of a file or folder: File name too long"),
    ],
)
def test_files_that_would_be_misread_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    if content:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_source(str(tmp_path / name))


def test_values_of_parquet_that_python_cannot_hold_spoil_no_other_row(tmp_path: Path) -> None:
    broken = pyarrow.py_buffer(b"a\xff\xfe"), pyarrow.py_buffer(struct.pack("<iii", 0, 1, 3))
    prompt = pyarrow.Array.from_buffers(pyarrow.string(), 2, [None, broken[1], broken[0]])
    times = pyarrow.array([2**62, 0], pyarrow.timestamp("us"))  # the year 148087
    pyarrow.parquet.write_table(pyarrow.table({"prompt": prompt, "time": times}), tmp_path / "a.parquet")
    good, bad = read_source(str(tmp_path / "a.parquet"))
    assert isinstance(good, Row) and good.fields == {"prompt": "a"}
    assert isinstance(bad, Row) and "a.parquet:2: it cannot be read: 'utf-8' codec" in bad.fault
