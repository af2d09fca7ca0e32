"""Python source files of this machine: which are read, and how held-out files are separated."""

from data.sources.python_source import SourceFile, docstring_pairs, source_files, split_files

LINES = [f"value_{number} = compute({number})" for number in range(40)]


def file(name: str, lines: list[str]) -> SourceFile:
    return SourceFile(name=name, text="\n".join(lines) + "\n")


def test_source_files_include_the_standard_library_and_packages():
    files = source_files(("yaml",))
    names = [file.name for file in files]
    assert "stdlib/argparse.py" in names
    assert any(name.startswith("yaml/") for name in names)
    assert len(set(names)) == len(names)
    assert not any("/test/" in name or "/tests/" in name or "site-packages" in name for name in names)
    assert all(file.text.isascii() and len(file.text) >= 200 for file in files)


def test_split_files_depends_on_names_alone():
    files = [file(f"stdlib/{number}.py", [f"x_{number}_{line} = {line}" for line in range(9)]) for number in range(200)]
    train, held_out = split_files(files, held_out_share=0.2, seed=3)
    assert len(train) + len(held_out) == 200
    assert 20 < len(held_out) < 60
    half = split_files(files[::2], held_out_share=0.2, seed=3)[1]
    assert {f.name for f in half} == {f.name for f in held_out} & {f.name for f in files[::2]}
    assert {f.name for f in split_files(files, held_out_share=0.2, seed=4)[1]} != {f.name for f in held_out}


def test_split_files_drops_near_duplicates_of_held_out_files():
    names = (f"a/{number}.py" for number in range(1000))
    held_out_name = next(name for name in names if split_files([file(name, LINES)], held_out_share=0.02)[1])
    others = [
        file("b/unrelated.py", [f"other({number})" for number in range(40)]),
        file("b/copy.py", LINES[:30] + ["changed()"] * 5),
        file("b/contains.py", [f"filler({number})" for number in range(400)] + LINES),
        file("b/shares_little.py", [f"mine({number})" for number in range(40)] + LINES[:8]),
    ]
    assert split_files(others, held_out_share=0.02)[1] == [], "the other files are not held out themselves"
    train, held_out = split_files([file(held_out_name, LINES), *others], held_out_share=0.02)
    assert [f.name for f in held_out] == [held_out_name]
    assert [f.name for f in train] == ["b/unrelated.py", "b/shares_little.py"]


def test_docstring_pairs_separate_functions_from_their_summaries():
    text = (
        "\x0c\n"  # ast does not treat a form feed as the end of a line
        "def area(width, height):\n"
        '    """Returns the area of a rectangle.\n\n    More of it.\n    """\n'
        "    return width * height\n\n"
        "class Shape:\n"
        "    async def draw(self):\n"
        "        '''Draws it on screen.'''\n"
        "        await self.show()\n\n"
        "def short():\n"
        '    """Too short."""\n'
        "    return 1\n\n"
        "def undocumented(a):\n"
        "    return a\n"
    )
    assert docstring_pairs([SourceFile(name="a.py", text=text), SourceFile(name="b.py", text="def (")]) == [
        ("def area(width, height):\n    return width * height\n", "Returns the area of a rectangle."),
        ("    async def draw(self):\n        await self.show()\n", "Draws it on screen."),
    ]
