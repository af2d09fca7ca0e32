"""Settings: frozen dataclasses filled from `--config file.yaml` and `--key value`, with all faults reported at once.

Supported types: bool, int, float, str, Path, `Literal[...]`, `X | None`, `tuple[X, ...]`, `list[X]` and `dict`.

A field may hold another dataclass, such as the drafter's Config: its fields are settings beside the others, with the
values of the field's default as their defaults. `metadata={"omit": names}` names those that are not settings, and
`metadata={"flags": {field: setting}}` those whose setting has another name.
"""

import ast
import dataclasses
import difflib
import inspect
import itertools
import re
import sys
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from draftsmith.artifacts.config_values import LARGEST, check_numbers
from draftsmith.loading import remote_code
from draftsmith.loading.text_files import parse_yaml

TRUE, FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
NO_DEFAULT = dataclasses.MISSING
RESERVED = ("config", "local_rank", "trust_remote_code")
"""Flags that are not settings: the preset, the rank that launchers add, which is ignored, and the permission for models
to run code of their own."""
ESTIMATES = ("dry_run", "pilot")
"""Settings of every recipe that trains a drafter, which others explain that they lack."""
COUNTS = re.compile("^(num|max)_|_(steps|tokens)$")
"""Names of whole numbers that are not negative; 0 often means all."""
T = typing.TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class _Setting:
    """A setting on the command line and in a preset."""

    annotation: Any
    default: Any
    """`NO_DEFAULT` for a required setting."""
    choices: tuple[Any, ...] | None
    help: str
    field: str
    """Class and field that it is of, for error messages."""

    @property
    def is_bool(self) -> bool:
        return bool in (self.annotation, *typing.get_args(self.annotation))

    @property
    def is_sequence(self) -> bool:
        return any(
            typing.get_origin(annotation) in (tuple, list)
            for annotation in (self.annotation, *typing.get_args(self.annotation))
        )


def parse_settings(*classes: type, description: str | None, argv: list[str] | None = None) -> tuple[Any, ...]:
    """Returns an instance of each dataclass in `classes`; flags override the YAML preset, which overrides defaults.

    `--some_key` and `--some-key` are the same; `--flag` alone means true and `--no-flag` false. Exits with status 2
    after printing every fault.
    """
    argv = sys.argv[1:] if argv is None else argv
    settings = _settings_by_name(classes)
    if {"-h", "--help"} & set(argv):
        print(_help(settings, description))
        raise SystemExit(0)

    faults: list[str] = []
    flags = dict(_read_flags(argv, settings, faults))
    preset: dict[str, Any] = {}
    values: dict[str, Any] = {}
    if "config" in flags:
        path = Path(flags.pop("config"))
        preset = _read_preset(path, settings, faults)
        values |= _converted(preset, settings, f"{path}: {{}}", faults)
    values |= _converted(flags, settings, "--{}", faults)
    required = [name for name, setting in settings.items() if setting.default is NO_DEFAULT]
    faults += [f"{_flag(name)} is required" for name in required if name not in {*preset, *flags}]

    instances: list[Any] = []
    for cls in classes if not faults else ():
        try:
            instances.append(from_flat(cls, values))
        except ValueError as error:
            faults.append(str(error))
    if faults:
        sys.stderr.write("".join(f"{Path(sys.argv[0]).name}: {fault}\n" for fault in faults))
        raise SystemExit(2)
    return tuple(instances)


# --- Dataclasses and their settings ------------------------------------------------------------------------------


def flat(instance: Any) -> dict[str, Any]:
    """Returns the values of a settings dataclass by the names of its settings."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(instance):
        value = getattr(instance, field.name)
        if _is_nested(value):
            values |= {name: getattr(value, inner) for inner, name in _nested_names(type(value), field).items()}
        else:
            values[field.name] = value
    return values


def from_flat(cls: type[T], values: Mapping[str, Any]) -> T:
    """Returns an instance of the dataclass `cls` from values by the names of settings; other names are ignored.

    Raises ValueError if a dataclass rejects its values.
    """
    arguments: dict[str, Any] = {}
    annotations = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        annotation, default = annotations[field.name], _default(field)
        if _is_nested(annotation):
            names = _nested_names(annotation, field)
            inner = {own: values[name] for own, name in names.items() if name in values}
            arguments[field.name] = (
                annotation(**inner) if default is NO_DEFAULT else dataclasses.replace(default, **inner)
            )
        elif field.name in values:
            arguments[field.name] = values[field.name]
    instance = cls(**arguments)
    check_numbers(instance)
    return instance


def _settings_by_name(classes: tuple[type, ...]) -> dict[str, _Setting]:
    settings: dict[str, _Setting] = {}
    for cls in classes:
        for name, setting in _settings_of(cls):
            assert name not in RESERVED, f"{setting.field}: the name {name} is reserved"
            assert name not in settings, (
                f"two settings are called {name}: {settings[name].field} and {setting.field}; "
                'drop or rename one, that of a nested dataclass in the metadata "omit" or "flags" of its field'
            )
            settings[name] = setting
    return settings


def _settings_of(cls: Any, defaults: Any = None) -> Iterator[tuple[str, _Setting]]:
    """Yields (name, setting) for the fields of a dataclass; `defaults` is an instance that holds their defaults."""
    annotations, docs = typing.get_type_hints(cls), _field_docs(cls)
    for field in dataclasses.fields(cls):
        annotation = annotations[field.name]
        default = _default(field) if defaults is None else getattr(defaults, field.name)
        if _is_nested(annotation):
            names = _nested_names(annotation, field)
            inner = _settings_of(annotation, None if default is NO_DEFAULT else default)
            yield from ((names[name], setting) for name, setting in inner if name in names)
            continue
        literal = typing.get_args(annotation) if _is_literal(annotation) else None
        yield (
            field.name,
            _Setting(
                annotation=annotation,
                default=default,
                choices=tuple(field.metadata.get("choices") or literal or ()) or None,
                help=docs.get(field.name, ""),
                field=f"{cls.__name__}.{field.name}",
            ),
        )


def _field_docs(cls: type) -> dict[str, str]:
    """Returns the docstrings beneath the fields of a class and its parents; nothing where there is no source."""
    docs = {}
    for one in reversed(cls.__mro__[:-1]):
        try:
            (body,) = ast.parse(textwrap.dedent(inspect.getsource(one))).body
        except (OSError, TypeError):
            continue
        statements = getattr(body, "body", [])
        for field, doc in itertools.pairwise(statements):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                text = doc.value.value if isinstance(doc, ast.Expr) and isinstance(doc.value, ast.Constant) else ""
                docs[field.target.id] = " ".join(str(text).split())
    return docs


def _nested_names(cls: Any, field: dataclasses.Field) -> dict[str, str]:
    """Returns the setting's name for each field of the dataclass `cls` that `field` holds."""
    omit, flags = field.metadata.get("omit", ()), field.metadata.get("flags", {})
    names = [inner.name for inner in dataclasses.fields(cls)]
    assert {*omit, *flags} <= {*names}, f"{cls.__module__}.{cls.__name__} lacks a field of {[*omit, *flags]}"
    return {name: flags.get(name, name) for name in names if name not in omit}


def _is_nested(annotation: Any) -> bool:
    return dataclasses.is_dataclass(annotation)


def _is_literal(annotation: Any) -> bool:
    return typing.get_origin(annotation) is typing.Literal


def _default(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is NO_DEFAULT else field.default_factory()


# --- Reading -----------------------------------------------------------------------------------------------------


def _read_flags(argv: list[str], settings: dict[str, _Setting], faults: list[str]) -> Iterator[tuple[str, Any]]:
    """Yields (name, text) for each flag, or texts for a sequence and bool for a switch; adds to `faults`."""
    words = list(argv)
    while words:
        word = words.pop(0)
        flag, has_value, value = word.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        positive = name.removeprefix("no_")
        if word in ("--trust-remote-code", "--trust_remote_code"):
            remote_code.allow()
        elif not word.startswith("--"):
            faults.append(f"unexpected argument {word!r}; settings are written --key value")
        elif name in settings and settings[name].is_bool and not has_value:
            is_value = words and words[0].lower() in TRUE + FALSE
            yield name, words.pop(0) if is_value else True
        elif positive in settings and name not in settings and not has_value:
            if settings[positive].is_bool:
                yield positive, False
            else:
                faults.append(f"{flag}: only true/false settings have a --no- form")
        elif name not in settings and name not in RESERVED:
            while words and not words[0].startswith("--"):
                words.pop(0)
            faults.append(_unknown(flag, settings, "on the command line"))
        else:
            texts = [value] if has_value else []
            takes_many = name in settings and settings[name].is_sequence
            while words and not words[0].startswith("--") and not has_value and (takes_many or not texts):
                texts.append(words.pop(0))
            if not texts:
                faults.append(f"{flag} needs a value")
            elif name != "local_rank":
                yield name, texts if takes_many and not texts[0].startswith("[") else texts[0]


def _read_preset(path: Path, settings: dict[str, _Setting], faults: list[str]) -> dict[str, Any]:
    if not path.is_file():
        faults.append(f"--config {path}: no such file")
        return {}
    try:
        preset = parse_yaml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        faults.append(f"--config {path}: not valid YAML: {error}")
        return {}
    if not isinstance(preset, dict):
        faults.append(f"--config {path}: must contain `key: value` lines")
        return {}
    preset = {str(key).replace("-", "_"): value for key, value in preset.items()}
    faults += [_unknown(key, settings, f"in {path}") for key in preset if key not in settings]
    return {key: value for key, value in preset.items() if key in settings}


def _unknown(key: str, settings: dict[str, _Setting], where: str) -> str:
    if key.lstrip("-").replace("-", "_") in ESTIMATES:
        return f"{key}: this recipe trains no drafter of one family, so there is no run to estimate; remove it"
    near = difflib.get_close_matches(key.lstrip("-").replace("-", "_"), settings, n=1, cutoff=0.5)
    hint = f"did you mean {_flag(near[0]) if key.startswith('-') else near[0]}?" if near else "see --help"
    return f"unknown setting {key!r} {where}; {hint}"


# --- Converting --------------------------------------------------------------------------------------------------


def _converted(raw: dict[str, Any], settings: dict[str, _Setting], where: str, faults: list[str]) -> dict[str, Any]:
    """Returns the values in `raw` converted to their types; adds those that cannot be to `faults`."""
    values = {}
    for name, value in raw.items():
        setting = settings[name]
        try:
            values[name] = _convert(value, setting.annotation)
            if setting.annotation is int and COUNTS.search(name) and values[name] < 0:
                raise ValueError(f"takes a whole number of at least 0, not {value!r}")
            if setting.choices and values[name] not in setting.choices:
                near = difflib.get_close_matches(str(value), [str(choice) for choice in setting.choices], n=1)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise ValueError(f"takes one of {', '.join(map(str, setting.choices))}, not {value!r}{hint}")
        except ValueError as error:
            faults.append(f"{where.format(_flag(name).removeprefix('--'))} {error}")
    return values


def _convert(value: Any, annotation: Any) -> Any:
    """Returns `value`, text or a value from YAML, as `annotation`.

    Raises ValueError, whose text follows the name of the setting.
    """
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        if value is None or value == "none":
            return None
        kinds = [argument for argument in arguments if argument is not types.NoneType]
        assert len(kinds) == 1, f"{annotation} is ambiguous; only unions with None are supported"
        return _convert(value, kinds[0])
    if origin in (tuple, list):
        if isinstance(value, str) and value.startswith("["):
            value = _parsed(value)
        items = value if isinstance(value, list | tuple) else [value]
        return origin(_convert(item, arguments[0]) for item in items)
    if _is_literal(annotation):
        return next((choice for choice in arguments if str(choice) == str(value)), value)
    if annotation is bool:
        if str(value).lower() in TRUE + FALSE:
            return str(value).lower() in TRUE
        raise ValueError(f"takes true or false, not {value!r}")
    if annotation in (int, float):
        try:
            if isinstance(value, bool) or (annotation is int and isinstance(value, float)):
                raise TypeError
            number = annotation(value)  # YAML reads 3e-4 as text
        except (TypeError, ValueError, OverflowError):
            raise ValueError(f"takes a {'whole ' * (annotation is int)}number, not {value!r:.40}") from None
        if not abs(number) <= (LARGEST if annotation is int else sys.float_info.max):
            kind = "whole number of at most 64 bits" if annotation is int else "finite number"
            raise ValueError(f"takes a {kind}, not {value!r:.40}")
        return number
    if annotation in (str, Path):
        if isinstance(value, str | int | float) and not isinstance(value, bool):
            return annotation(str(value))
        raise ValueError(f"takes text, not {value!r}")
    assert dict in (annotation, origin), f"settings of type {annotation} are not supported"
    value = _parsed(value) if isinstance(value, str) else value
    if isinstance(value, dict):
        return value
    raise ValueError(f"takes a mapping like {{key: value}}, not {value!r}")


def _parsed(text: str) -> Any:
    try:
        return parse_yaml(text)
    except ValueError:
        raise ValueError(f"is not valid YAML: {text!r:.40}") from None


# --- Help --------------------------------------------------------------------------------------------------------


def _help(settings: dict[str, _Setting], description: str | None) -> str:
    lines = [f"usage: {Path(sys.argv[0]).name} [--config FILE.yaml] [--key value ...]", ""]
    lines += [description.strip(), ""] if description else []
    lines += ["settings:", *_entry("--config FILE.yaml", "Preset of these settings in YAML; flags override it.")]
    lines += _entry("--trust-remote-code", "Let models run the Python code in their folders; without it none is run.")
    for name, setting in settings.items():
        usage = _flag(name) if setting.is_bool else f"{_flag(name)} {_placeholder(setting)}"
        default = "required" if setting.default is NO_DEFAULT else f"default {setting.default!r}"
        lines += _entry(usage, f"{setting.help} [{default}]")
    return "\n".join(lines)


def _entry(usage: str, text: str) -> list[str]:
    lines = [" " * 30 + line for line in textwrap.wrap(text.strip(), 120 - 30)]
    if len(usage) > 26:
        return [f"  {usage}", *lines]
    return [f"  {usage:<28}{lines[0].strip()}", *lines[1:]]


def _placeholder(setting: _Setting) -> str:
    if setting.choices:
        return f"{{{','.join(map(str, setting.choices))}}}"
    names = {int: "N", float: "X", str: "TEXT", Path: "PATH"}
    kinds = (setting.annotation, *typing.get_args(setting.annotation))
    name = next((names[kind] for kind in kinds if kind in names), "VALUE")
    return f"{name} ..." if setting.is_sequence else name


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
