"""Exports an artifact as a folder that a server loads, with the command that launches it.

Each family that a server supports has a module of its name in `families`, with the dictionary `WRITERS`: engine ->
function (source, folder) -> Launch. A writer first rejects unsupported configurations, before weights are loaded, and
then writes the folder. A family without a writer for transformers is exported for `generate(custom_generate=...)`.
"""

import difflib
import importlib
import pkgutil
from collections.abc import Callable
from pathlib import Path

from draftsmith.artifacts.artifact import MANIFEST, family_of, local_folder, read_manifest
from draftsmith.artifacts.files import atomic_folder, check_folder, check_replaceable
from draftsmith.export import custom_generate, families
from draftsmith.export.launch import ENGINE_NAMES, LAUNCH, Launch, write_launch
from draftsmith.export.source import ExportSource, open_source

ENGINES = tuple(ENGINE_NAMES)
Writer = Callable[[ExportSource, Path], Launch]


def export(
    artifact: str | Path,
    to: str,
    output: str | Path,
    target: str | None = None,
    target_name: str = "",
    *,
    quantise: str = "",
    quantise_target: str = "",
) -> Path:
    """Exports an artifact for the engine `to` into the folder `output`, with the launch command in `launch.json`.

    `artifact` is a folder or owner/name on the hub, `target` a transformers folder or hub name, by default the target
    that the artifact was made for. `target_name` is the target where the export will be used: its folder or hub name,
    which an export for speculators names (by default the hub name, or the folder relative to `output`), a GGUF file of
    it for llama.cpp, or its converted folder for OpenVINO GenAI. `quantise` and `quantise_target` are types of matrices
    in an export for llama.cpp (ggml's, such as q8_0) or OpenVINO GenAI (such as int8). A previous export at `output` is
    replaced. Raises ValueError if the engine does not support the drafter, the artifact was made for another target, or
    `output` contains other files; nothing is written then.
    """
    if to not in ENGINES:
        near = difflib.get_close_matches(to, ENGINES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(ENGINES)}"
        raise ValueError(f"unknown engine {to!r}; {hint}")
    artifact_folder = local_folder(artifact)
    manifest = read_manifest(artifact_folder)
    family_of(manifest, artifact_folder)
    write = _writer(manifest["family"], to)
    if target_name and to not in ("speculators", "llama.cpp", "openvino"):
        raise ValueError(
            f"target_name is {target_name!r}; only exports for speculators, llama.cpp and openvino name the target, not"
            f" for {to}"
        )
    if (quantise or quantise_target) and to not in ("llama.cpp", "openvino"):
        raise ValueError(
            f"quantise is {quantise or quantise_target!r}; only exports for llama.cpp and openvino are quantised, not"
            f" for {to}"
        )
    check_folder(Path(output))
    path = Path(output).resolve()
    if (path / MANIFEST).exists():
        raise ValueError(f"{output} is an artifact; name another output folder")
    check_replaceable(path, marker=LAUNCH)
    source = open_source(
        artifact_folder.resolve(),
        manifest,
        path,
        target,
        target_name,
        quantise=quantise,
        quantise_target=quantise_target,
    )
    if source.target_info.is_encoder_decoder and write is not custom_generate.write:
        if to != "transformers":
            raise ValueError(
                f"{ENGINE_NAMES[to]} does not draft for encoder-decoders such as {source.target_name}; export it --to"
                " transformers"
            )
        write = custom_generate.write
    with atomic_folder(path, marker=LAUNCH) as folder:
        write_launch(folder, source, to, write(source, folder))
    return path


def writers(family: str) -> dict[str, Writer]:
    """Returns the writers of a family by engine."""
    modules = {info.name for info in pkgutil.iter_modules(families.__path__)}
    own = importlib.import_module(f"draftsmith.export.families.{family}").WRITERS if family in modules else {}
    return {"transformers": custom_generate.write} | own


def _writer(family: str, engine: str) -> Writer:
    available = writers(family)
    if engine in available:
        return available[engine]
    others = [name for name in available if name != "transformers"]
    raise ValueError(
        f"{ENGINE_NAMES[engine]} does not run drafters of family {family!r}; "
        + (f"export it --to {' or '.join(others)}, or " if others else "")
        + "run it with draftsmith's generate or exported --to transformers as a custom_generate folder"
    )
