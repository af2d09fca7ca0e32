"""The rules of the house that a machine can check: who may import whom, where families are named, lengths, safety."""

import ast
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAY_IMPORT = {
    "draftsmith": set(),
    "data": {"draftsmith"},
    "trainers": {"draftsmith", "data"},
    "eval": {"draftsmith", "data"},
}
OWN_FOLDERS = {*MAY_IMPORT, "recipes", "tests", "benchmarks"}
THIN_NEEDS = {"torch", "transformers", "numpy", "safetensors"}
MORE_NEEDS = {
    "draftsmith/drafters/trigram/compiled.py": "numba",
    "draftsmith/artifacts/hub.py": "huggingface_hub",
    "draftsmith/parts/neural/quantised.py": "torchao",
}
"""The one file that may import what: drafters that need the compiler ask for it when they are made, the hub's client
comes with transformers and is loaded when the hub is asked."""
NOT_IN_SERVERS = ("deepspeed", "wandb", "datasets", "peft", "matplotlib", "numba")
FAMILY_FOLDERS = ("draftsmith.drafters", "trainers", "draftsmith.export")
EVERYDAY_WORDS = {"lm_head", "lm_heads", "original_lm_head"}
"""Identifiers that hold a family's name and do not mean the family."""
EVERYDAY_NAMES = {"ngram", "recycling", "rest", "suffix", "merge", "staged"}
"""Families called by everyday words: they are recognised where they are imported or named whole, as text."""


@lru_cache
def files(*endings: str) -> list[Path]:
    """Returns the repository's files with these endings, those that git ignores left out."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True
    )
    if listed.returncode == 0:
        paths = [ROOT / name for name in os.fsdecode(listed.stdout).split("\0") if name]
    else:
        paths = [path for path in ROOT.rglob("*") if not any(part.startswith(".") for part in path.parts)]
    return sorted(path for path in paths if path.suffix in endings and path.is_file())


def python_files(*folders: str) -> list[Path]:
    return [path for path in files(".py") if path.relative_to(ROOT).parts[0] in folders]


@lru_cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def place(path: Path, node: ast.AST) -> str:
    return f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}"


# --- Who may import whom -----------------------------------------------------------------------------------------


def imports(path: Path) -> Iterator[tuple[ast.AST, str]]:
    """Yields every import, those inside functions too, as (where, top-level package)."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name.split(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node, path.relative_to(ROOT).parts[0] if node.level else (node.module or "").split(".")[0]


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_arrows_point_inward(folder: str) -> None:
    allowed = MAY_IMPORT[folder] | {folder}
    wrong = [
        f"{place(path, node)} imports {package}"
        for path in python_files(folder)
        for node, package in imports(path)
        if package in OWN_FOLDERS - allowed
    ]
    assert not wrong, "\n".join(wrong)


def test_the_thin_module_needs_little() -> None:
    allowed = THIN_NEEDS | set(sys.stdlib_module_names) | {"draftsmith"}
    wrong = [
        f"{place(path, node)} imports {package}"
        for path in python_files("draftsmith")
        for node, package in imports(path)
        if package not in allowed and MORE_NEEDS.get(str(path.relative_to(ROOT))) != package
    ]
    assert not wrong, "\n".join(wrong)


def test_every_folder_imports_from_anywhere_and_draftsmith_loads_no_training_packages(tmp_path: Path) -> None:
    look = f"print([name for name in {NOT_IN_SERVERS} if name in sys.modules])"
    code = f"import sys, draftsmith; {look}; import data, trainers, eval, recipes"
    assert run_python("-c", code, cwd=tmp_path).stdout.strip() == "[]"


def test_the_wheel_holds_draftsmith_alone(tmp_path: Path) -> None:
    run_python("-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path), cwd=ROOT)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"draftsmith"}
    modules = {str(path.relative_to(ROOT)) for path in python_files("draftsmith")}
    assert {name for name in names if name.endswith(".py")} == modules


def test_recipes_shadow_no_package() -> None:
    """`python recipes/x.py` puts that folder first on the path."""
    taken = OWN_FOLDERS | set(sys.stdlib_module_names) | THIN_NEEDS | set(NOT_IN_SERVERS) | {"accelerate", "yaml"}
    assert not taken & {path.stem for path in python_files("recipes")}


# --- Families ----------------------------------------------------------------------------------------------------


@lru_cache
def families() -> set[str]:
    """Returns the name of every family: a file of drafters/, or of trainers/ with `Settings` and `build` or `fit`."""
    names = {path.stem for path in (ROOT / "draftsmith" / "drafters").glob("*.py")} - {"__init__", "blocks"}
    for path in python_files("trainers"):
        defined = {getattr(node, "name", None) for node in parsed(path).body}
        if "Settings" in defined and defined & {"build", "fit"}:
            names.add(path.stem)
    return names


@lru_cache
def own_names(path: Path) -> set[str]:
    """Returns the families that a file may name: its own, and the drafter it trains if that has another name."""
    if path.stem not in families() or (ROOT / "draftsmith" / "drafters" / path.name).exists():
        return {path.stem}
    imported = {
        f"{node.module}.{alias.name}"
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    drafters = {
        name for name in families() if any(f"{one}.".startswith(f"draftsmith.drafters.{name}.") for one in imported)
    }
    return {path.stem} | drafters


def code_words(tree: ast.Module) -> Iterator[tuple[ast.AST, str]]:
    """Yields identifiers and string constants; docstrings, also those beneath fields, are no code."""
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield from ((node, word) for word in re.findall(r"\w+", node.value))
        for attribute in ("id", "attr", "arg", "name", "asname", "module"):
            identifier = getattr(node, attribute, None)
            if isinstance(identifier, str):
                yield from ((node, word) for word in identifier.split("."))


@lru_cache(None)
def names_family(word: str, family: str) -> bool:
    camel = family.title().replace("_", "")
    return word not in EVERYDAY_WORDS and (
        f"_{family}_" in f"_{word}_" or (len(family) > 3 and re.match(rf"_*{camel}(?![a-z])", word) is not None)
    )


def naming(tree: ast.Module, family: str) -> Iterator[tuple[ast.AST, str]]:
    """Yields the words of code that mean the family."""
    if family in EVERYDAY_NAMES:
        yield from ((node, word) for node, word in listed(whole_names, tree) if word == family)
    else:
        yield from ((node, word) for node, word in listed(code_words, tree) if names_family(word, family))


@lru_cache
def listed(words: Callable[[ast.Module], Iterator[tuple[ast.AST, str]]], tree: ast.Module) -> list[tuple[ast.AST, str]]:
    """Returns what is asked of a tree for one family after the other."""
    return list(words(tree))


def whole_names(tree: ast.Module) -> Iterator[tuple[ast.AST, str]]:
    """Yields texts that are one word, and what is imported from the folders of families.

    What an engine is told by the key "method" is a word of the engine's.
    """
    pairs = [
        pair
        for node in ast.walk(tree)
        if isinstance(node, ast.Dict)
        for pair in zip(node.keys, node.values, strict=True)
    ]
    methods = {id(value) for key, value in pairs if getattr(key, "value", None) == "method"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in methods:
            yield node, node.value
        elif isinstance(node, ast.ImportFrom) and node.module:
            folder, _, name = node.module.rpartition(".")
            if folder in FAMILY_FOLDERS:
                yield node, name
            if node.module in FAMILY_FOLDERS:
                yield from ((node, alias.name) for alias in node.names)


def test_no_family_is_named_outside_its_own_files() -> None:
    wrong = [
        f"{place(path, node)} names {family} ({word})"
        for path in python_files(*MAY_IMPORT)
        for family in families() - own_names(path)
        for node, word in naming(parsed(path), family)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("medusa = 1", True),
        ("from draftsmith.drafters import medusa", True),
        ("if family == 'medusa': pass", True),
        ("class MedusaHeads: pass", True),
        ("def load_medusa_tree(): pass", True),
        ("model.lm_head(x)", False),
        ("from transformers import AutoModelForCausalLM", False),
        ("'''Works as medusa does.'''", False),
        ("from draftsmith.drafters import rest", True),
        ("from trainers.rest import Settings", True),
        ("from draftsmith.export import rest", True),
        ("launch({'method': 'rest'})", False),
        ("find('rest')", True),
        ("first, *rest = rest_of(rows)", False),
    ],
)
def test_how_a_family_is_recognised(code: str, found: bool) -> None:
    assert any([*naming(ast.parse(code), family)] for family in ("medusa", "lm", "rest")) == found


def test_what_writes_for_engines_is_called_as_its_family() -> None:
    """A family's fifth file, if it has one, offers `WRITERS`; the other files of the folder offer none."""
    for path in (ROOT / "draftsmith" / "export").glob("*.py"):
        offers = any(
            isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "WRITERS" for node in parsed(path).body
        )
        assert offers == (path.stem in families()), path.name


def test_files_are_short() -> None:
    folders = [folder.replace(".", "/") for folder in FAMILY_FOLDERS]
    own_files = {ROOT / folder / f"{name}.py" for folder in folders for name in families()}
    lengths = {path: len(path.read_text().splitlines()) for path in files(".py", ".sh")}
    limits = {path: 250 if path in own_files else 500 for path in lengths}
    wrong = [
        f"{path.relative_to(ROOT)}: {n} lines, at most {limits[path]}"
        for path, n in lengths.items()
        if n > limits[path]
    ]
    assert not wrong, "\n".join(wrong)


# --- Safety ------------------------------------------------------------------------------------------------------


def test_no_path_of_one_machine() -> None:
    pattern = re.compile(r"(?<![\w.~}\])$*-])/(tmp|work|root|home)/")
    wrong = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in files(".py", ".md", ".sh", ".toml", ".yaml", ".yml")
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if pattern.search(line)
    ]
    assert not wrong, "\n".join(wrong)


def unsafe(tree: ast.Module) -> Iterator[tuple[ast.AST, str]]:
    """Yields what could run code found in a file: pickle, and remote code without anyone asking for it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = getattr(node, "module", None)
            for name in [module] if module else [alias.name for alias in node.names]:
                if name.split(".")[0] in ("pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"):
                    yield node, f"imports {name}"
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            flags = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if called == "torch.load" and flags.get("weights_only") != "True":
                yield node, "torch.load without weights_only=True"
            if called in ("yaml.load", "yaml.unsafe_load", "yaml.full_load"):
                yield node, called
            if flags.get("allow_pickle") == "True":
                yield node, "allow_pickle=True"
            if flags.get("trust_remote_code") == "True":
                yield node, "trust_remote_code=True without the user's word"


def test_nothing_runs_code_from_files() -> None:
    wrong = [f"{place(path, node)} {what}" for path in files(".py") for node, what in unsafe(parsed(path))]
    assert not wrong, "\n".join(wrong)


# --- README and style --------------------------------------------------------------------------------------------


def test_the_file_map_of_the_readme_is_true() -> None:
    """In the section whose title holds "map", each table row's or code line's first word is a path from the root."""
    readme = ROOT / "README.md"
    if not readme.exists():
        pytest.skip("README.md is not written yet")
    sections = re.split(r"^#+ ", readme.read_text(), flags=re.MULTILINE)
    (section,) = [text for text in sections if re.search(r"\bmap\b", text.splitlines()[0] if text else "", re.I)]
    rows = re.findall(r"^\| *`([^`]+)`", section, flags=re.MULTILINE)
    blocks = re.findall(r"^```\w*\n(.*?)^```", section, flags=re.MULTILINE | re.DOTALL)
    paths = rows + [line.split()[0] for block in blocks for line in block.splitlines() if line.strip()]
    assert paths, "the file map names no files"
    assert not [path for path in paths if not list(ROOT.glob(path.rstrip("/")))]


@pytest.mark.parametrize(
    "command", ["ruff format --check --quiet .", "ruff check --quiet --output-format concise .", "mypy"]
)
def test_formatter_linter_and_type_checker_are_content(command: str) -> None:
    run_python("-m", *command.split(), cwd=ROOT)


def run_python(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done
