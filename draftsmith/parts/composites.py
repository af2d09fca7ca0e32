"""Drafters made of drafters: how a configuration names the parts, how they are kept, and what each is told.

A part is named as {"family": ..., "config": ...} and kept as an artifact of its own in the folder of the whole, as
`drafters/0`, `drafters/1` and so on.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from draftsmith.artifacts import artifact
from draftsmith.artifacts.families import find, name_of
from draftsmith.core.drafter import Drafter, Session, Step, always_continue
from draftsmith.core.target import Target
from draftsmith.core.tree import Draft
from draftsmith.length.controller import LengthControlled, with_length_control

Names = tuple[dict[str, Any], ...]
FOLDER = "drafters"


class Part:
    """One of several drafters: it sees of the hidden layers its own, and has its own policy of lengths."""

    def __init__(self, drafter: Drafter, record: dict[str, Any] | None = None) -> None:
        self.drafter, self.config, self.hidden_layers = drafter, drafter.config, drafter.hidden_layers
        self.record = record or {}
        """What its manifest says of how it came to be."""

    @property
    def name(self) -> str:
        return name_of(self.drafter)

    def start(self, session: Session) -> None:
        # What the whole is asked by is no concern of its parts.
        self._session = replace(session, hidden=self._own(session.hidden), should_continue=always_continue)
        self._controlled = with_length_control(self.drafter, "auto")
        self._controlled.start(self._session)

    def rewind(self, lengths: list[int]) -> None:
        """Goes on with all rows, of which what came after so many tokens was taken back and is perhaps another text.

        A drafter that defines `rewind` is told the same; any other is begun anew and keeps what its policy has learnt.
        """
        if not self.drafter.rewind(lengths):
            self._controlled.start(self._session)
        elif isinstance(self._controlled, LengthControlled):
            self._controlled.reactivate()

    def propose(self, budget: int) -> Draft:
        return self._controlled.propose(budget)

    def observe(self, step: Step) -> None:
        self._controlled.observe(replace(step, hidden=self._own(step.hidden)))

    def _own(self, hidden: dict[int, Tensor]) -> dict[int, Tensor]:
        return {layer: hidden[layer] for layer in self.hidden_layers if layer in hidden}


def check(parts: Names, *, least: int = 2) -> None:
    """Raises ValueError unless these name so many parts at least, each a family and its configuration."""
    if len(parts) < least:
        raise ValueError(f"{len(parts)} part(s) named; there must be at least {least}")
    for place, part in enumerate(parts):
        if not isinstance(part, dict) or set(part) != {"family", "config"}:
            raise ValueError(f'part {place} is {part}; it must be {{"family": name, "config": settings}}')


def named(drafter: Drafter) -> dict[str, Any]:
    """Returns a drafter's name as a part."""
    return {"family": name_of(drafter), "config": json.loads(json.dumps(asdict(drafter.config)))}


def made(part: dict[str, Any], target: Target) -> Part:
    """Returns a new drafter, its weights, if any, as they are made."""
    module = find(part["family"])
    config = artifact.make_config(module.Config, part["config"], f"part {part['family']}")
    drafter: Drafter = module.Drafter(config, target)
    if isinstance(drafter, nn.Module):
        drafter.eval().requires_grad_(False)
        drafter.on_weights_loaded()
    return fit(Part(drafter), target)


def load(path: str | Path, target: Target, *, made_for: Target | None = None) -> Part:
    """Returns the drafter of an artifact, as `artifact.load` does."""
    manifest = artifact.read_manifest(path)
    # What it is and what for is written anew; how it came to be stays.
    record = {key: manifest[key] for key in manifest.keys() - {"target", "tokenizer_hash", "config"}}
    return fit(Part(artifact.load(path, target, made_for=made_for), record), target)


def fit(part: Part, target: Target) -> Part:
    """Returns the part; raises ValueError if it drafts for a target that it has changed."""
    if part.drafter.target is not target:
        raise ValueError(
            f"{part.name} has tuned its target, and parts draft for one that stays as it is: compose drafters without"
        )
    return part


def save_parts(parts: Iterable[Part], folder: Path) -> None:
    """Writes each part's artifact into the folder of the whole."""
    for place, part in enumerate(parts):
        artifact.save(part.drafter, folder / FOLDER / str(place), part.drafter.target, record=part.record)


def load_part(folder: Path, names: Names, place: int, target: Target) -> Part:
    """Returns one part as `save_parts` wrote it; raises ValueError if it is another than `names` says, or unfit."""
    path = folder / FOLDER / str(place)
    manifest = artifact.read_manifest(path)
    if {key: manifest[key] for key in ("family", "config")} != names[place]:
        raise ValueError(f"{path} holds another drafter than {folder / artifact.MANIFEST} names; make it again")
    return load(path, target)


def forget_all(parts: Iterable[Part]) -> None:
    """Makes parts forget earlier calls."""
    for part in parts:
        part.drafter.forget()


def layers(parts: Iterable[Part]) -> tuple[int, ...]:
    """Returns all hidden layers that parts read."""
    return tuple(sorted({layer for part in parts for layer in part.hidden_layers}))


def parameters(parts: Iterable[Part]) -> Iterator[Tensor]:
    """Yields the weights of all parts."""
    for part in parts:
        yield from part.drafter.parameters()
