"""Python source files of this machine, on which the pocket targets are trained and prompted.

Files come from the standard library and from installed packages, without tests. A file is held out by a hash of its
name, independently of other files. Training files that share much of their text with a held-out file are dropped, so
that held-out losses and acceptance rates are never measured on training text.
"""

import ast
import hashlib
import io
import string
import sysconfig
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

# Packages whose source the pocket targets are trained on, all pinned by this project.
PACKAGES = (
    *("torch", "transformers", "peft", "datasets", "accelerate", "deepspeed", "huggingface_hub", "wandb"),
    *("numpy", "matplotlib", "safetensors", "tokenizers", "tqdm", "yaml", "fsspec", "pytest", "_pytest", "bayes_opt"),
)
SKIPPED_FOLDERS = {"test", "tests", "testing", "idlelib", "lib2to3", "site-packages"} | {
    *("__pycache__", "_vendor", "_internal"),
}
MAX_FILE_BYTES = 200_000
MIN_FILE_BYTES = 200
SHINGLE_LINES = 4


@dataclass(frozen=True, kw_only=True)
class SourceFile:
    """One file; `name` is its path relative to the library's root, which is the same on every machine."""

    name: str
    text: str


def source_files(packages: tuple[str, ...] = PACKAGES) -> list[SourceFile]:
    """Returns the readable Python files of the standard library, then of each of `packages`, sorted by name."""
    roots = [(Path(sysconfig.get_path("stdlib")), "stdlib")]
    for package in packages:
        folder = Path(sysconfig.get_path("purelib")) / package
        if folder.is_dir():
            roots.append((folder, package))
    files = []
    for root, label in roots:
        for path in sorted(root.rglob("*.py")):
            relative = path.relative_to(root)
            if SKIPPED_FOLDERS & set(relative.parts[:-1]) or path.name.startswith("test_"):
                continue
            text = _readable_text(path)
            if text is not None:
                files.append(SourceFile(name=f"{label}/{relative.as_posix()}", text=text))
    return files


def split_files(
    files: list[SourceFile], *, held_out_share: float = 0.01, seed: int = 0, max_overlap: float = 0.3
) -> tuple[list[SourceFile], list[SourceFile]]:
    """Splits `files` into (train, held_out) by a hash of name and seed, and drops near-duplicates from train.

    A training file is dropped if more than `max_overlap` of its runs of four lines occur in held-out files, or if it
    contains more than `max_overlap` of the runs of any held-out file.
    """
    train: list[SourceFile] = []
    held_out: list[SourceFile] = []
    for file in files:
        digest = hashlib.sha256(f"{seed}:{file.name}".encode()).digest()
        is_held_out = int.from_bytes(digest[:8], "big") / 2**64 < held_out_share
        (held_out if is_held_out else train).append(file)
    owners: dict[int, list[int]] = defaultdict(list)
    num_shingles = []
    for index, file in enumerate(held_out):
        shingles = _shingles(file.text)
        num_shingles.append(len(shingles))
        for shingle in shingles:
            owners[shingle].append(index)
    kept = []
    for file in train:
        own = _shingles(file.text)
        shared = [shingle for shingle in own if shingle in owners]
        per_held_out: dict[int, int] = defaultdict(int)
        for shingle in shared:
            for index in owners[shingle]:
                per_held_out[index] += 1
        covers_one = any(count > max_overlap * num_shingles[index] for index, count in per_held_out.items())
        if len(shared) <= max_overlap * len(own) and not covers_one:
            kept.append(file)
    return kept, held_out


def docstring_pairs(files: list[SourceFile], *, max_source_bytes: int = 4_000) -> list[tuple[str, str]]:
    """Returns (function source without its docstring, first docstring line) for every documented function."""
    pairs = []
    for file in files:
        try:
            tree = ast.parse(file.text)
        except (SyntaxError, ValueError):
            continue
        lines = io.StringIO(file.text).readlines()  # not splitlines(): ast does not count form feeds as line ends
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            summary = (ast.get_docstring(node) or "").strip().split("\n")[0].strip()
            if len(summary.split()) < 3 or len(node.body) < 2:
                continue
            doc = node.body[0]
            body = lines[node.lineno - 1 : doc.lineno - 1] + lines[doc.end_lineno : node.end_lineno]
            source = "".join(body)
            if len(source) <= max_source_bytes:
                pairs.append((source, summary))
    return pairs


def _readable_text(path: Path) -> str | None:
    """Returns the file's text, None for files that are too large, too small, not ASCII, or tables of data."""
    if not MIN_FILE_BYTES <= path.stat().st_size <= MAX_FILE_BYTES:
        return None
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None
    if not text.isascii():
        return None
    share_of_digits = sum(map(text.count, string.digits)) / len(text)
    longest_line = max(map(len, text.splitlines()))
    return None if share_of_digits > 0.2 or longest_line > 1_000 else text


def _shingles(text: str) -> set[int]:
    lines = [stripped for line in text.splitlines() if len(stripped := line.strip()) > 3 and stripped[0] != "#"]
    return {hash(tuple(lines[i : i + SHINGLE_LINES])) for i in range(len(lines) - SHINGLE_LINES + 1)}
