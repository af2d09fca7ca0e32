"""Rules that a machine can check: import directions, rooms, families, safety of loading, links of the documentation."""

import ast
import os
import re
import subprocess
import sys
import zipfile
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import pytest

from draftsmith.artifacts.families import names

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("draftsmith", "data", "trainers", "eval")
OWN_FOLDERS = {*PACKAGES, "recipes", "tests", "benchmarks"}
THIN_NEEDS = {"torch", "transformers", "numpy", "safetensors"}
OPTIONAL_NEEDS = {
    "draftsmith/drafters/trigram/compiled.py": "numba",
    "draftsmith/artifacts/hub.py": "huggingface_hub",
    "draftsmith/artifacts/model_card.py": "huggingface_hub",
    "draftsmith/parts/neural/quantised.py": "torchao",
    "draftsmith/loading/gguf_files.py": "gguf",
    "draftsmith/loading/gguf_contents.py": "gguf",
    "draftsmith/loading/target_names.py": "yaml",
    "draftsmith/loading/text_files.py": "yaml",
}
"""Further packages that single files may import: numba, torchao and gguf are imported when a drafter or target needs
them, the hub's client and yaml come with transformers."""
NOT_IN_SERVERS = ("deepspeed", "wandb", "datasets", "peft", "matplotlib", "numba")
MAX_FLAT = 9
"""Most modules that lie flat in one package, `__init__.py` not counted."""
LISTS = {
    "benchmarks",
    "draftsmith/drafters",
    "draftsmith/export/families",
    "trainers",
    "recipes",
    "tests/drafters",
    "tests/trainers",
}
"""Packages that are lists, of families, trainers, recipes or benchmarks, and as long as there are members."""
CORE = ("draftsmith/core", "draftsmith/verify", "draftsmith/decoding.py")
RESEARCH = ("draftsmith/verify/research", "draftsmith/verify/lossy", "draftsmith/core/fixed_shapes")
ARCHITECTURES = "draftsmith/core/architectures"
MAX_CORE_LINES, MAX_ARCHITECTURE_LINES = 3_000, 1_000


@lru_cache
def files(*endings: str) -> list[Path]:
    """Returns the repository's files with these endings, without those that git ignores."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True
    )
    if listed.returncode == 0:
        paths = [ROOT / name for name in os.fsdecode(listed.stdout).split("\0") if name]
    else:
        paths = [path for path in ROOT.rglob("*") if not any(part.startswith(".") for part in path.parts)]
    return sorted(path for path in set(paths) if path.suffix in endings and path.is_file())


def python_files(*folders: str) -> list[Path]:
    return [path for path in files(".py") if path.relative_to(ROOT).parts[0] in folders]


@lru_cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def location(path: Path, node: ast.AST) -> str:
    return f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}"


# --- Imports -----------------------------------------------------------------------------------------------------


def imports(path: Path) -> Iterator[tuple[ast.AST, str]]:
    """Yields every import, those inside functions too, as (node, top-level package)."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name.split(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node, path.relative_to(ROOT).parts[0] if node.level else (node.module or "").split(".")[0]


def test_import_rules_of_pyproject_hold() -> None:
    """Layers, cycles, and families that nobody imports but through `find`: `[tool.importlinter]` in pyproject.toml."""
    run_python("-c", "from importlinter.cli import lint_imports_command as run; run()", "--no-cache", cwd=ROOT)


def test_packages_import_no_recipes_tests_or_benchmarks() -> None:
    wrong = [
        f"{location(path, node)} imports {package}"
        for path in python_files(*PACKAGES)
        for node, package in imports(path)
        if package in OWN_FOLDERS - set(PACKAGES)
    ]
    assert not wrong, "\n".join(wrong)


def test_inference_module_needs_few_packages() -> None:
    allowed = THIN_NEEDS | set(sys.stdlib_module_names) | {"draftsmith"}
    wrong = [
        f"{location(path, node)} imports {package}"
        for path in python_files("draftsmith")
        for node, package in imports(path)
        if package not in allowed and OPTIONAL_NEEDS.get(str(path.relative_to(ROOT))) != package
    ]
    assert not wrong, "\n".join(wrong)


def test_packages_import_from_any_folder_and_draftsmith_loads_no_training_packages(tmp_path: Path) -> None:
    loaded = f"print([name for name in {NOT_IN_SERVERS} if name in sys.modules])"
    code = f"import sys, draftsmith; {loaded}; import data, trainers, eval, recipes"
    assert run_python("-c", code, cwd=tmp_path).stdout.strip() == "[]"


def test_wheel_holds_draftsmith_alone(tmp_path: Path) -> None:
    run_python("-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path), cwd=ROOT)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"draftsmith"}
    modules = {str(path.relative_to(ROOT)) for path in python_files("draftsmith")}
    assert {name for name in names if name.endswith(".py")} == modules
    assert "draftsmith/py.typed" in names


def test_recipes_shadow_no_package() -> None:
    """`python recipes/x.py` puts that folder first on the path."""
    taken = OWN_FOLDERS | set(sys.stdlib_module_names) | THIN_NEEDS | set(NOT_IN_SERVERS) | {"accelerate", "yaml"}
    assert not taken & {path.stem for path in python_files("recipes")}


# --- Rooms and families ------------------------------------------------------------------------------------------


def test_packages_hold_few_modules_flat() -> None:
    """A reader who opens a folder sees at most nine modules; lists of families, trainers and recipes are longer."""
    flat = Counter(
        str(path.parent.relative_to(ROOT)) for path in python_files(*OWN_FOLDERS) if path.name != "__init__.py"
    )
    wrong = [f"{folder}: {number} modules" for folder, number in flat.items() if number > MAX_FLAT]
    assert not [line for line in wrong if line.split(":")[0] not in LISTS], "\n".join(wrong)


def test_verification_core_is_short() -> None:
    """The verification core, without families, drafting of trees and length policies, can be read in a day."""
    paths = [path.relative_to(ROOT).as_posix() for path in python_files("draftsmith")]
    core = [path for path in paths if path.startswith(CORE) and not path.startswith((*RESEARCH, ARCHITECTURES))]
    assert num_lines(core) <= MAX_CORE_LINES
    assert num_lines([path for path in paths if path.startswith(ARCHITECTURES)]) <= MAX_ARCHITECTURE_LINES


def num_lines(paths: list[str]) -> int:
    return sum(len((ROOT / path).read_text().splitlines()) for path in paths)


def test_export_modules_are_called_as_their_families() -> None:
    """A family that an engine runs has a module of its name that offers `WRITERS`."""
    for path in sorted((ROOT / "draftsmith" / "export" / "families").glob("[a-z]*.py")):
        assert path.stem in names(), path.name
        assert any(
            isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "WRITERS" for node in parsed(path).body
        ), path.name


# --- Safety ------------------------------------------------------------------------------------------------------


def test_no_file_names_a_path_of_one_machine() -> None:
    pattern = re.compile(r"(?<![\w.~}\])$*-])/(tmp|work|root|home)/")
    wrong = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in files(".py", ".md", ".sh", ".toml", ".yaml", ".yml")
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if pattern.search(line)
    ]
    assert not wrong, "\n".join(wrong)


FLAGS = ("weights_only", "allow_pickle", "trust_remote_code")


def unsafe(tree: ast.Module) -> Iterator[tuple[ast.AST, str]]:
    """Yields calls that could run code found in a file: pickle, and remote code that the user did not allow."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = getattr(node, "module", None)
            for name in [module] if module else [alias.name for alias in node.names]:
                if name.split(".")[0] in ("pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"):
                    yield node, f"imports {name}"
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func) if getattr(node.func, "attr", "").endswith("load") else ""
            flags = {one.arg: ast.unparse(one.value) for one in node.keywords if one.arg in FLAGS}
            if called == "torch.load" and flags.get("weights_only") != "True":
                yield node, "torch.load without weights_only=True"
            if called in ("yaml.load", "yaml.unsafe_load", "yaml.full_load"):
                yield node, called
            if flags.get("allow_pickle") == "True":
                yield node, "allow_pickle=True"
            if flags.get("trust_remote_code") == "True":
                yield node, "trust_remote_code=True without the user's permission"


def test_no_code_is_run_from_loaded_files() -> None:
    wrong = [f"{location(path, node)} {what}" for path in files(".py") for node, what in unsafe(parsed(path))]
    assert not wrong, "\n".join(wrong)


# --- Documentation and style ---------------------------------------------------------------------------------------


def test_links_and_paths_of_the_documentation_exist() -> None:
    """Relative links of Markdown files, and paths in backticks that begin with a folder of the repository."""
    missing = []
    for page in files(".md"):
        text = page.read_text()
        links = re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)[^)]*\)", text)
        missing += [f"{page.relative_to(ROOT)}: {link}" for link in links if not (page.parent / link).exists()]
        if page.name in ("LOG.md", "CHANGELOG.md"):
            continue  # these name files as they were called at the time
        folders = "|".join((*OWN_FOLDERS, "docs", "findings"))
        paths = re.findall(rf"`((?:{folders})/[\w./*-]+)`", text)
        paths = [path for path in paths if "NAME" not in path]  # a name that the reader chooses
        missing += [f"{page.relative_to(ROOT)}: {path}" for path in paths if not list(ROOT.glob(path.rstrip("/")))]
    assert not missing, "\n".join(missing)


def test_readme_is_at_most_150_lines() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize(
    "command", ["ruff format --check --quiet .", "ruff check --quiet --output-format concise .", "mypy"]
)
def test_formatter_linter_and_type_checker_pass(command: str) -> None:
    run_python("-m", *command.split(), cwd=ROOT)


def run_python(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done
