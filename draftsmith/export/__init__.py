"""Exports: one artifact written as a folder that a server loads, and the command that launches it.

A family that a server runs has a file here, called as the family: `WRITERS` names the engines it can be written for,
each with a function (given, folder) -> Launch that first refuses what cannot be, from configurations alone, and then
writes. Whatever has none for transformers is written as a folder for `generate(custom_generate=...)`.
"""

import difflib
import importlib
import pkgutil
from collections.abc import Callable
from pathlib import Path

from draftsmith.artifacts.artifact import MANIFEST, local_folder, read_manifest
from draftsmith.artifacts.files import atomic_folder, check_replaceable
from draftsmith.core.drafter import find
from draftsmith.export import custom, families
from draftsmith.export.given import Given, read_given
from draftsmith.export.launch import LAUNCH, NAMES, Launch, write_launch

ENGINES = tuple(NAMES)
Writer = Callable[[Given, Path], Launch]


def export(artifact: str | Path, to: str, output: str | Path, target: str | None = None) -> Path:
    """Writes an artifact as the folder `output` for the engine `to`, and how to launch it as `launch.json` there.

    The artifact is a folder or owner/name on the hub, `target` a transformers folder or hub name, by default the one
    that the artifact was made for. A former export at `output` is replaced. Raises ValueError for an engine that does
    not run such a drafter, an artifact that was made for another target, and an output that holds something else;
    nothing is written then.
    """
    if to not in ENGINES:
        near = difflib.get_close_matches(to, ENGINES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(ENGINES)}"
        raise ValueError(f"unknown engine {to!r}; {hint}")
    source = local_folder(artifact)
    manifest = read_manifest(source)
    find(manifest["family"])
    write = _writer(manifest["family"], to)
    path = Path(output).resolve()
    if (path / MANIFEST).exists():
        raise ValueError(f"{output} is an artifact; name another folder to export to")
    check_replaceable(path, marker=LAUNCH)
    given = read_given(source.resolve(), manifest, path, target)
    if given.facts.is_encoder_decoder and write is not custom.write:
        if to != "transformers":
            raise ValueError(
                f"{NAMES[to]} does not draft for encoder-decoders as {given.target_name}; export it --to transformers"
            )
        write = custom.write
    with atomic_folder(path, marker=LAUNCH) as folder:
        write_launch(folder, given, to, write(given, folder))
    return path


def writers(family: str) -> dict[str, Writer]:
    """Returns what a family can be written for, by engine."""
    named = {info.name for info in pkgutil.iter_modules(families.__path__)}
    own = importlib.import_module(f"draftsmith.export.families.{family}").WRITERS if family in named else {}
    return {"transformers": custom.write} | own


def _writer(family: str, engine: str) -> Writer:
    offered = writers(family)
    if engine in offered:
        return offered[engine]
    others = [name for name in offered if name != "transformers"]
    raise ValueError(
        f"{NAMES[engine]} does not run drafters of family {family!r}; "
        + (f"export it --to {' or '.join(others)}, or " if others else "")
        + "run it with draftsmith, by its own generate or exported --to transformers as a custom_generate folder"
    )
