"""Finds families of drafters by name: those of draftsmith, and those that installed packages name as entry points.

A family is a module or package that defines `Config`, a frozen dataclass of what its artifact must remember, and
`Drafter(config, target)`. It lies in draftsmith/drafters or is an entry point of the group "draftsmith.families".
"""

import difflib
import importlib
import pkgutil
import sys
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from types import ModuleType

from draftsmith.core.drafter import Drafter

FAMILIES = "draftsmith.drafters"
ENTRY_POINTS = "draftsmith.families"
"""Group of entry points by which an installed package names the modules of its families."""


def names() -> list[str]:
    """Returns the families of draftsmith and of installed packages."""
    return sorted({*_built_in(), *(entry.name for entry in _installed())})


def find(name: str) -> ModuleType:
    """Returns a family's module.

    Raises ValueError for an unknown name, giving the nearest spelling, and for a family of an installed package whose
    name is taken or whose module cannot be imported.
    """
    entries = _entries(name)
    packages = ["draftsmith"] * (name in _built_in()) + [_package(entry) for entry in entries]
    if not packages:
        near = difflib.get_close_matches(name, names(), n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"the families are {', '.join(names())}"
        raise ValueError(f"unknown drafter family {name!r}; {hint}")
    if len(packages) > 1:
        raise ValueError(f"drafter family {name!r} is defined by {' and '.join(packages)}; uninstall all but one")
    if not entries:
        return importlib.import_module(f"{FAMILIES}.{name}")
    try:
        module = importlib.import_module(entries[0].value)
        missing = [part for part in ("Config", "Drafter") if part not in vars(module)]
        if missing:
            raise ImportError(f"{entries[0].value} does not define {' and '.join(missing)}")
    except Exception as error:  # another package's code may raise anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(
            f"drafter family {name!r} of the installed package {packages[0]} cannot be imported ({reason}); update or"
            " uninstall the package"
        ) from error
    return module


def name_of(drafter: Drafter) -> str:
    """Returns the name of a drafter's family; raises ValueError if it belongs to none."""
    paths = {f"{FAMILIES}.{name}": name for name in _built_in()}
    paths |= {entry.value: entry.name for entry in _installed()}
    families = {vars(sys.modules[path]).get("Drafter"): name for path, name in paths.items() if path in sys.modules}
    for kind in type(drafter).__mro__:
        if kind in families:
            return families[kind]
    raise ValueError(
        f"{type(drafter).__qualname__} is the Drafter of no family; name its module in the entry-point group"
        f" {ENTRY_POINTS!r} of an installed package"
    )


def package_of(name: str) -> str | None:
    """Returns the installed package that defines a family, None for draftsmith's own."""
    return next((_package(entry) for entry in _entries(name)), None)


@cache
def _built_in() -> tuple[str, ...]:
    return tuple(info.name for info in pkgutil.iter_modules(importlib.import_module(FAMILIES).__path__))


def _installed() -> tuple[EntryPoint, ...]:
    return _installed_on(tuple(sys.path))


@cache
def _installed_on(path: tuple[str, ...]) -> tuple[EntryPoint, ...]:
    # Reading the metadata of all packages on the path takes 15 ms.
    return tuple(entry_points(group=ENTRY_POINTS))


def _entries(name: str) -> list[EntryPoint]:
    return [entry for entry in _installed() if entry.name == name]


def _package(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist is not None else entry.value
