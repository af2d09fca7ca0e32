"""Settings of a run: frozen dataclasses filled from `--config file.yaml` and `--key value`, all faults listed at once."""

import difflib
import sys
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser


def parse_settings(*kinds: type, description: str, argv: list[str] | None = None) -> tuple[Any, ...]:
    """Returns one instance of each dataclass in `kinds`; flags beat the YAML preset, which beats defaults.

    `--some_key` and `--some-key` are the same; `--local_rank`, added by launchers, is accepted and dropped.
    Exits with status 2 after listing every unknown key with its nearest spelling, before anything is loaded.
    """
    parser = HfArgumentParser(kinds, description=description, allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE.yaml", help="a YAML preset of these same keys")
    parser.add_argument("--local_rank", "--local-rank", type=int, default=-1, help="set by launchers; ignored")
    argv = sys.argv[1:] if argv is None else argv
    keys = [action.dest for action in parser._actions if action.dest not in ("help", "config", "local_rank")]
    faults: list[str] = []

    preset_path = parser.parse_known_args(argv)[0].config if "--help" not in argv and "-h" not in argv else None
    if preset_path is not None:
        preset = _read_preset(Path(preset_path), faults)
        faults += [_unknown(key, keys, f"in {preset_path}") for key in preset if key.replace("-", "_") not in keys]
        for action in parser._actions:
            value = next((preset[key] for key in (action.dest, action.dest.replace("_", "-")) if key in preset), None)
            if value is not None:
                action.required = False
                parser.set_defaults(**{action.dest: value})
    namespace, unknown = parser.parse_known_args(argv)
    faults += [_unknown(word.split("=")[0], keys, "on the command line") for word in unknown if word.startswith("-")]
    if unknown and not faults:
        faults.append(f"do not know what to do with {unknown[0]!r}: settings are written --key value")
    if faults:
        parser.exit(2, "".join(f"{Path(sys.argv[0]).name}: {fault}\n" for fault in faults))
    try:
        *filled, _ = parser.parse_dict(vars(namespace), allow_extra_keys=True), None
        return tuple(filled[0])
    except ValueError as error:
        parser.exit(2, f"{Path(sys.argv[0]).name}: {error}\n")
        raise AssertionError from None


def _read_preset(path: Path, faults: list[str]) -> dict[str, Any]:
    if not path.is_file():
        faults.append(f"--config {path}: no such file")
        return {}
    try:
        preset = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        faults.append(f"--config {path}: not valid YAML: {' '.join(str(error).split())}")
        return {}
    if not isinstance(preset, dict):
        faults.append(f"--config {path}: should hold `key: value` lines")
        return {}
    return preset


def _unknown(key: str, keys: list[str], where: str) -> str:
    plain = key.lstrip("-").replace("-", "_")
    near = difflib.get_close_matches(plain, keys, n=1, cutoff=0.5)
    hint = f"did you mean --{near[0].replace('_', '-')}?" if near else "see --help"
    return f"unknown setting {key!r} {where}; {hint}"
