"""Settings of a run: frozen dataclasses filled from `--config file.yaml` and `--key value`, all faults listed at once.

Understood types: bool, int, float, str, Path, `Literal[...]`, `X | None`, `tuple[X, ...]`, `list[X]` and `dict`.

A field may hold another dataclass, such as the drafter's Config: its fields are settings beside the others, with the
values of the field's default as their defaults. `metadata={"omit": names}` names those that are not settings, and
`metadata={"flags": {field: setting}}` those whose setting has another name.
"""

import ast
import dataclasses
import difflib
import inspect
import itertools
import sys
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

TRUE, FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
NO_DEFAULT = dataclasses.MISSING
T = typing.TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class _Key:
    """One setting, as the command line and a preset see it."""

    kind: Any
    """Its annotation."""
    default: Any
    """`NO_DEFAULT` when it must be given."""
    choices: tuple[Any, ...] | None
    help: str

    @property
    def is_bool(self) -> bool:
        return bool in (self.kind, *typing.get_args(self.kind))

    @property
    def is_sequence(self) -> bool:
        return any(typing.get_origin(kind) in (tuple, list) for kind in (self.kind, *typing.get_args(self.kind)))


def parse_settings(*kinds: type, description: str | None, argv: list[str] | None = None) -> tuple[Any, ...]:
    """Returns one instance of each dataclass in `kinds`; flags beat the YAML preset, which beats defaults.

    `--some_key` and `--some-key` are the same, `--flag` alone is true and `--no-flag` false; `--local_rank`, added by
    launchers, is accepted and dropped. Exits with status 2 after listing every fault, before anything is loaded.
    """
    argv = sys.argv[1:] if argv is None else argv
    keys = _keys(kinds)
    if {"-h", "--help"} & set(argv):
        print(_help(keys, description))
        raise SystemExit(0)

    faults: list[str] = []
    flags = dict(_read_flags(argv, keys, faults))
    preset: dict[str, Any] = {}
    values: dict[str, Any] = {}
    if "config" in flags:
        path = Path(flags.pop("config"))
        preset = _read_preset(path, keys, faults)
        values |= _converted(preset, keys, f"{path}: {{}}", faults)
    values |= _converted(flags, keys, "--{}", faults)
    missing = [name for name, key in keys.items() if key.default is NO_DEFAULT and name not in {*preset, *flags}]
    faults += [f"{_flag(name)} must be given" for name in missing]

    settings: list[Any] = []
    for kind in kinds if not faults else ():
        try:
            settings.append(from_flat(kind, values))
        except ValueError as error:
            faults.append(str(error))
    if faults:
        sys.stderr.write("".join(f"{Path(sys.argv[0]).name}: {fault}\n" for fault in faults))
        raise SystemExit(2)
    return tuple(settings)


def flat(settings: Any) -> dict[str, Any]:
    """Returns the values of a settings dataclass under the names of the command line."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            values |= {name: getattr(value, inner) for inner, name in _nested_names(type(value), field).items()}
        else:
            values[field.name] = value
    return values


def from_flat(kind: type[T], values: Mapping[str, Any]) -> T:
    """Returns the dataclass `kind` with `values` under the names of the command line, which may hold other names too.

    Raises ValueError where a dataclass rejects its values.
    """
    given: dict[str, Any] = {}
    annotations = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        annotation, default = annotations[field.name], _default(field)
        if _is_nested(annotation):
            names = _nested_names(annotation, field)
            inner = {own: values[name] for own, name in names.items() if name in values}
            given[field.name] = annotation(**inner) if default is NO_DEFAULT else dataclasses.replace(default, **inner)
        elif field.name in values:
            given[field.name] = values[field.name]
    return kind(**given)


def _nested_names(kind: Any, field: dataclasses.Field) -> dict[str, str]:
    """Returns the setting's name of each field of the dataclass `kind` that `field` holds."""
    omit, flags = field.metadata.get("omit", ()), field.metadata.get("flags", {})
    names = [inner.name for inner in dataclasses.fields(kind)]
    assert {*omit, *flags} <= {*names}, f"{kind.__module__}.{kind.__name__} lacks a field of {[*omit, *flags]}"
    return {name: flags.get(name, name) for name in names if name not in omit}


def _is_nested(kind: Any) -> bool:
    return dataclasses.is_dataclass(kind)


def _default(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is NO_DEFAULT else field.default_factory()


def _keys(kinds: tuple[type, ...]) -> dict[str, _Key]:
    keys: dict[str, _Key] = {}
    origins: dict[str, str] = {}
    for kind in kinds:
        for name, origin, key in _keys_of(kind):
            assert name not in ("config", "local_rank"), f"{origin}: the name {name} is taken"
            assert name not in keys, (
                f"two settings are called {name}: {origins[name]} and {origin}; "
                'drop or rename one, that of a nested dataclass in the metadata "omit" or "flags" of its field'
            )
            keys[name], origins[name] = key, origin
    return keys


def _keys_of(kind: Any, defaults: Any = None) -> Iterator[tuple[str, str, _Key]]:
    """Yields (name, class and field, key) of each setting; `defaults` is an instance that holds the defaults."""
    annotations, docs = typing.get_type_hints(kind), _field_docs(kind)
    for field in dataclasses.fields(kind):
        annotation = annotations[field.name]
        default = _default(field) if defaults is None else getattr(defaults, field.name)
        if _is_nested(annotation):
            names = _nested_names(annotation, field)
            inner = _keys_of(annotation, None if default is NO_DEFAULT else default)
            yield from ((names[name], origin, key) for name, origin, key in inner if name in names)
            continue
        literal = typing.get_args(annotation) if _is_literal(annotation) else None
        choices = tuple(field.metadata.get("choices") or literal or ()) or None
        key = _Key(kind=annotation, default=default, choices=choices, help=docs.get(field.name, ""))
        yield field.name, f"{kind.__name__}.{field.name}", key


def _field_docs(kind: type) -> dict[str, str]:
    """Returns the docstring beneath each field, in the class and its parents; nothing where there is no source."""
    docs = {}
    for cls in reversed(kind.__mro__[:-1]):
        try:
            (body,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
        except (OSError, TypeError):
            continue
        statements = getattr(body, "body", [])
        for field, doc in itertools.pairwise(statements):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                text = doc.value.value if isinstance(doc, ast.Expr) and isinstance(doc.value, ast.Constant) else ""
                docs[field.target.id] = " ".join(str(text).split())
    return docs


def part_of(kind: type[T], settings: Any, **others: Any) -> T:
    """Returns the dataclass `kind` with what `settings` has under the names of its fields, and `others`."""
    names = {field.name for field in dataclasses.fields(kind)} & {field.name for field in dataclasses.fields(settings)}  # type: ignore[arg-type]
    return kind(**{name: getattr(settings, name) for name in names} | others)


# --- Reading -----------------------------------------------------------------------------------------------------


def _read_flags(argv: list[str], keys: dict[str, _Key], faults: list[str]) -> Iterator[tuple[str, Any]]:
    """Yields (key, text) for every flag, or (key, list of texts) for sequences; what is not understood is a fault."""
    words = list(argv)
    while words:
        word = words.pop(0)
        flag, has_value, value = word.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        if not word.startswith("--"):
            faults.append(f"do not know what to do with {word!r}: settings are written --key value")
        elif name in keys and keys[name].is_bool and not has_value:
            is_value = words and words[0].lower() in TRUE + FALSE
            yield name, words.pop(0) if is_value else True
        elif name.removeprefix("no_") in keys and name not in keys and not has_value:
            if keys[name.removeprefix("no_")].is_bool:
                yield name.removeprefix("no_"), False
            else:
                faults.append(f"{flag}: only switches have a --no- form")
        elif name not in keys and name not in ("config", "local_rank"):
            while words and not words[0].startswith("--"):
                words.pop(0)
            faults.append(_unknown(flag, keys, "on the command line"))
        else:
            texts = [value] if has_value else []
            takes_many = name in keys and keys[name].is_sequence
            while words and not words[0].startswith("--") and not has_value and (takes_many or not texts):
                texts.append(words.pop(0))
            if not texts:
                faults.append(f"{flag} needs a value")
            elif name != "local_rank":
                yield name, texts if takes_many and not texts[0].startswith("[") else texts[0]


def _read_preset(path: Path, keys: dict[str, _Key], faults: list[str]) -> dict[str, Any]:
    if not path.is_file():
        faults.append(f"--config {path}: no such file")
        return {}
    try:
        preset = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        faults.append(f"--config {path}: not valid YAML: {' '.join(str(error).split())}")
        return {}
    if not isinstance(preset, dict):
        faults.append(f"--config {path}: should hold `key: value` lines")
        return {}
    preset = {str(key).replace("-", "_"): value for key, value in preset.items()}
    faults += [_unknown(key, keys, f"in {path}") for key in preset if key not in keys]
    return {key: value for key, value in preset.items() if key in keys}


def _unknown(key: str, keys: dict[str, _Key], where: str) -> str:
    near = difflib.get_close_matches(key.lstrip("-").replace("-", "_"), keys, n=1, cutoff=0.5)
    hint = f"did you mean {_flag(near[0]) if key.startswith('-') else near[0]}?" if near else "see --help"
    return f"unknown setting {key!r} {where}; {hint}"


# --- Converting --------------------------------------------------------------------------------------------------


def _converted(raw: dict[str, Any], keys: dict[str, _Key], where: str, faults: list[str]) -> dict[str, Any]:
    values = {}
    for name, value in raw.items():
        key = keys[name]
        try:
            values[name] = _convert(value, key.kind)
            if key.choices and values[name] not in key.choices:
                near = difflib.get_close_matches(str(value), [str(choice) for choice in key.choices], n=1)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise ValueError(f"takes one of {', '.join(map(str, key.choices))}, not {value!r}{hint}")
        except ValueError as error:
            faults.append(f"{where.format(_flag(name).removeprefix('--'))} {error}")
    return values


def _convert(value: Any, kind: Any) -> Any:
    """Returns `value`, text or what YAML made of it, as `kind`; raises ValueError as the end of a sentence."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None or value == "none":
            return None
        kinds = [argument for argument in arguments if argument is not types.NoneType]
        assert len(kinds) == 1, f"no way to tell which of {kind} a setting is"
        return _convert(value, kinds[0])
    if origin in (tuple, list):
        if isinstance(value, str) and value.startswith("["):
            value = _parsed(value)
        items = value if isinstance(value, list | tuple) else [value]
        return origin(_convert(item, arguments[0]) for item in items)
    if _is_literal(kind):
        return next((choice for choice in arguments if str(choice) == str(value)), value)
    if kind is bool:
        if str(value).lower() in TRUE + FALSE:
            return str(value).lower() in TRUE
        raise ValueError(f"takes true or false, not {value!r}")
    if kind in (int, float):
        try:
            if isinstance(value, bool) or (kind is int and isinstance(value, float)):
                raise TypeError
            return kind(value)  # YAML reads 3e-4 as text
        except (TypeError, ValueError):
            raise ValueError(f"takes a {'whole ' * (kind is int)}number, not {value!r}") from None
    if kind in (str, Path):
        if isinstance(value, str | int | float) and not isinstance(value, bool):
            return kind(str(value))
        raise ValueError(f"takes text, not {value!r}")
    assert dict in (kind, origin), f"no way to read a setting of type {kind}"
    value = _parsed(value) if isinstance(value, str) else value
    if isinstance(value, dict):
        return value
    raise ValueError(f"takes a mapping like {{key: value}}, not {value!r}")


def _parsed(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise ValueError(f"is not valid YAML: {text!r}") from None


def _is_literal(kind: Any) -> bool:
    return typing.get_origin(kind) is typing.Literal


# --- Help --------------------------------------------------------------------------------------------------------


def _help(keys: dict[str, _Key], description: str | None) -> str:
    lines = [f"usage: {Path(sys.argv[0]).name} [--config FILE.yaml] [--key value ...]", ""]
    lines += [description.strip(), ""] if description else []
    lines += ["settings:", *_entry("--config FILE.yaml", "A preset of these same keys; flags beat it.")]
    for name, key in keys.items():
        usage = _flag(name) if key.is_bool else f"{_flag(name)} {_placeholder(key)}"
        default = "required" if key.default is NO_DEFAULT else f"default {key.default!r}"
        lines += _entry(usage, f"{key.help} [{default}]")
    return "\n".join(lines)


def _entry(usage: str, text: str) -> list[str]:
    lines = [" " * 30 + line for line in textwrap.wrap(text.strip(), 120 - 30)]
    if len(usage) > 26:
        return [f"  {usage}", *lines]
    return [f"  {usage:<28}{lines[0].strip()}", *lines[1:]]


def _placeholder(key: _Key) -> str:
    if key.choices:
        return f"{{{','.join(map(str, key.choices))}}}"
    names = {int: "N", float: "X", str: "TEXT", Path: "PATH"}
    kinds = (key.kind, *typing.get_args(key.kind))
    name = next((names[kind] for kind in kinds if kind in names), "VALUE")
    return f"{name} ..." if key.is_sequence else name


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
