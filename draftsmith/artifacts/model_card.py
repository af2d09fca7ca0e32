"""The README.md of an artifact's folder: where it comes from, how it measured, how to load and to serve it.

It ends in a hash of itself. One that somebody has written or changed by hand is never lost: it is kept beside the new.
"""

import hashlib
import json
import re
import shutil
import warnings
from collections.abc import Iterator, Sequence
from itertools import count
from math import prod
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

CARD, KEPT = "README.md", "README.edited"
WEIGHTS = "model.safetensors"
PLACE = "path/to/this/folder"
"""Stands in the card for the folder, which may be moved."""
SIGNATURE = "<!-- written by draftsmith, sha256 {} -->\n"
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

Table = Sequence[Sequence[str]]


def is_hub_name(name: str) -> bool:
    """Returns whether `name` can be a repository's on the hub, owner and name, and is nothing local."""
    return HUB_NAME.fullmatch(name) is not None and not Path(name).exists()


def card(manifest: dict[str, Any], weights: Path | None = None, *, place: str = PLACE, measured: str = "") -> str:
    """Returns the card of the artifact that `manifest` describes.

    `weights` is its safetensors file, if it has one, `place` what it is loaded by, and `measured` a further section.
    """
    family, target = manifest["family"], manifest["target"]
    front = {"library_name": "draftsmith", "tags": ["draftsmith", "speculative-decoding", family]}
    if is_hub_name(target["name"]):
        front["base_model"] = target["name"]
    parts = [
        "---\n" + "".join(f"{key}: {json.dumps(value)}\n" for key, value in front.items()) + "---",
        f"# A drafter of family {family} for {target['name'].rstrip('/').rpartition('/')[2]}",
        f"Made by draftsmith for speculative decoding. {_promise(manifest)}",
        "## Where it comes from",
        _grid([("", ""), *_provenance(manifest, weights)]),
        *_acceptance(manifest),
        *([measured] if measured else []),
        "## Loading",
        _loading(manifest, place),
        "## Serving",
        _serving(family, place),
    ]
    return sign("\n\n".join(parts) + "\n")


def sign(text: str) -> str:
    """Returns the text with its hash beneath."""
    return text + SIGNATURE.format(hashlib.sha256(text.encode()).hexdigest()[:16])


def body(text: str) -> str | None:
    """Returns a card without its hash, None if it was changed since, or written by somebody else."""
    whole, _, _ = text.rpartition(SIGNATURE.partition("{}")[0])
    return whole if whole and sign(whole) == text else None


def keep_edited(old: Path, new: Path) -> str | None:
    """Copies READMEs written by hand in `old` to `new`, under names that no card takes; returns that of the last."""
    for file in sorted(old.glob(f"{KEPT}*.md")) if old != new else ():
        shutil.copy(file, new)
    edited = old / CARD
    if not edited.is_file() or body(edited.read_text(errors="replace")) is not None:
        return None
    names = (f"{KEPT}{number if number > 1 else ''}.md" for number in count(1))
    name = next(name for name in names if not (new / name).exists())
    shutil.copy(edited, new / name)
    return name


def warn_of_kept(folder: Path, name: str | None) -> None:
    """Says under which name, if any, a README of the folder has been kept."""
    if name is not None:
        warnings.warn(f"{folder / CARD} was written by hand; it is kept as {name} beside the new one", stacklevel=3)


def rewrite(folder: Path, manifest: dict[str, Any], measured: str = "") -> str | None:
    """Writes the card in an artifact's folder anew; returns the name under which one written by hand is kept."""
    text, kept = card(manifest, folder / WEIGHTS, measured=measured), keep_edited(folder, folder)
    staging = folder / f".{CARD}.part"
    staging.write_text(text)
    staging.replace(folder / CARD)
    return kept


def for_hub(folder: Path, manifest: dict[str, Any], name: str) -> str:
    """Returns the card in an artifact's folder, loading it by `name` if nobody has edited it."""
    file = folder / CARD
    text = file.read_text() if file.is_file() else card(manifest, folder / WEIGHTS)
    own = body(text)
    return text if own is None else sign(own.replace(PLACE, name))


def num_parameters(file: Path) -> int:
    """Returns how many numbers a safetensors file holds, by its header; raises ValueError if it is truncated."""
    try:
        with safe_open(file, framework="pt") as tensors:
            return sum(prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{file} is truncated or no safetensors file ({error})") from error


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Returns the rows of a comparison's JSON; raises ValueError if it holds none."""
    try:
        rows = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}); name the bakeoff.json of a comparison") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) and "drafter" in row for row in rows):
        raise ValueError(f"{path} holds no comparison; name the bakeoff.json of one")
    return rows


def measured_section(rows: Sequence[dict[str, Any]], names: Sequence[str], family: str) -> str:
    """Returns what a comparison (`bakeoff.json`) says of the drafter called by one of `names`.

    Raises ValueError if it was not among those compared, or was of another family.
    """
    own = [row for row in rows if row["drafter"] in names and row["family"] == family]
    if not own:
        others = ", ".join(sorted({str(row["drafter"]) for row in rows if row["family"] and not row["is_ablation"]}))
        raise ValueError(f"no drafter called {names[0]} of family {family} was compared; those that were: {others}")
    first = own[0]
    facts = (
        f"{first['num_prompts']} prompts, {first['max_new_tokens']} new tokens each, {first['dtype']}, on"
        f" {first['hardware']}, {first['threads']} thread(s); {first['rounds']} rounds, commit {first['commit']},"
        f" torch {first['torch']}, transformers {first['transformers_version']}."
    )
    head = ("temperature", "batch", "tokens a forward", "tokens/s", "speed-up", "predicted", "output", "accepted, %")
    return f"## Measured\n\n{facts}\n\n" + _grid([head, *(tuple(_measurements(row)) for row in own)])


def _measurements(row: dict[str, Any]) -> Iterator[str]:
    yield from (f"{row['temperature']:g}", str(row["batch_size"]), f"{row['tau']:.2f}", f"{row['tokens_per_s']:,.0f}")
    yield f"{row['speedup']:.2f}x" + " slower" * (row["speedup"] < 0.995)
    yield f"{row['predicted_speedup']:.2f}x" if row.get("predicted_speedup") else ""
    kept = "identical" if row["identical"] else "same law" if row["identical"] is None else "DIFFERS"
    yield kept if row["lossless"] else "lossy"
    yield " ".join(f"{100 * share:.0f}" for share in row["accepted_per_depth"][:5])


def _promise(manifest: dict[str, Any]) -> str:
    if manifest.get("acceptance_mode", "lossless") != "lossless":
        return f"It is lossy ({manifest['acceptance_mode']}): what it helps to write may differ from the target's text."
    if manifest.get("tunes_target"):
        return (
            "It has tuned its target: it is lossless for that changed one, whose text may differ from the original's."
        )
    return (
        "It is lossless: with it the target writes what it writes alone, token for token at temperature 0 and by the"
        " same law when sampled."
    )


def _provenance(manifest: dict[str, Any], weights: Path | None) -> Iterator[tuple[str, str]]:
    target, settings = manifest["target"], manifest.get("settings", {})
    yield "target", f"`{target['name']}`, weights {target['fingerprint']}, vocabulary of {manifest['vocab_size']:,}"
    yield "tokenizer", manifest.get("tokenizer_hash") or ""
    data = [f"`{settings['data']}`" if settings.get("data") else "", manifest.get("data_fingerprint") or ""]
    yield "data", ", fingerprint ".join(filter(None, data))
    yield "command", f"`{manifest['command']}`" if manifest.get("command") else ""
    yield "commit", manifest.get("commit") or ""
    yield "seed", str(manifest.get("seed", ""))
    yield "training", f"{manifest['train_s']:,.0f} s" if manifest.get("train_s") is not None else ""
    yield "versions", ", ".join(f"{name} {version}" for name, version in manifest.get("versions", {}).items())
    if weights is not None and weights.is_file():
        yield "size", f"{num_parameters(weights):,} parameters, {weights.stat().st_size / 1e6:.2f} MB"


def _acceptance(manifest: dict[str, Any]) -> Iterator[str]:
    measured = manifest.get("measured_acceptance") or {}
    if measured:
        yield "## Measured on held-out rows of the data"
        yield _grid([("metric", "mean"), *((name, f"{value:.4g}") for name, value in measured.items())])


def _loading(manifest: dict[str, Any], place: str) -> str:
    name = json.dumps(manifest["target"]["name"])
    target = "drafter.target" if manifest.get("tunes_target") else "target"
    return f"""```python
import draftsmith

target = draftsmith.Target.from_pretrained({name})
drafter = draftsmith.load({json.dumps(place)}, target)
ids = target.tokenizer("some text", return_tensors="pt")["input_ids"]
out = draftsmith.generate({target}, ids, drafter, max_new_tokens=64)
print(target.tokenizer.decode(out.sequences[0]))
```

or `draftsmith generate --target {manifest["target"]["name"]} --draft {place} "some text"`."""


def _serving(family: str, place: str) -> str:
    from draftsmith.export import writers

    commands = "\n".join(f"draftsmith export {place} --to {engine} OUT" for engine in writers(family))
    return f"```\n{commands}\n```\n\nEach writes a folder for that engine, and prints the command that starts it."


def _grid(lines: Table) -> str:
    """Returns a Markdown table of the lines that say something, the first its header."""
    rows = ["| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines]
    kept = [row for row, line in zip(rows[1:], lines[1:], strict=True) if any(line[1:])]
    return "\n".join([rows[0], "|" + " --- |" * len(lines[0]), *kept])
