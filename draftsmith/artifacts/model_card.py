"""Model cards: the README.md of an artifact, with its provenance, its measurements, and how to load and serve it.

A card ends in a hash of itself, so that one written or edited by hand is recognised and kept beside a new one.
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

from huggingface_hub import ModelCardData
from safetensors import SafetensorError, safe_open

from draftsmith.artifacts import json_text
from draftsmith.artifacts.families import find
from draftsmith.artifacts.files import inside

CARD, KEPT = "README.md", "README.edited"
WEIGHTS = "model.safetensors"
PLACEHOLDER = "path/to/this/folder"
"""Placeholder in the card for the artifact's folder, which may be moved."""
ROW_KEYS = {
    *("drafter", "family", "is_ablation", "temperature", "batch_size", "tau", "tokens_per_s", "speedup"),
    *("identical", "lossless", "accepted_per_depth", "num_prompts", "max_new_tokens", "dtype", "hardware"),
    *("threads", "rounds", "commit", "torch", "transformers_version"),
}
"""What a card reads of each row of a comparison."""
SIGNATURE = "<!-- written by draftsmith, sha256 {} -->\n"
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_hub_name(name: str) -> bool:
    """Returns whether `name` has the form owner/name of a hub repository and is no local path."""
    return HUB_NAME.fullmatch(name) is not None and not Path(name).exists()


def card(manifest: dict[str, Any], weights: Path | None = None, *, path: str = PLACEHOLDER, measured: str = "") -> str:
    """Returns the card of the artifact that `manifest` describes.

    `weights` is its safetensors file, if it has one, `path` the folder or repository to load it from, and `measured` an
    additional section.
    """
    family, target = manifest["family"], manifest["target"]
    metadata = ModelCardData(
        library_name="draftsmith",
        tags=["draftsmith", "speculative-decoding", family],
        base_model=target["name"] if is_hub_name(target["name"]) else None,
    )
    parts = [
        f"---\n{metadata.to_yaml()}\n---",
        f"# A drafter of family {family} for {target['name'].rstrip('/').rpartition('/')[2]}",
        f"Made by draftsmith for speculative decoding. {_guarantee(manifest)}",
        "## Provenance",
        _table([("", ""), *_provenance(manifest, weights)]),
        *_acceptance(manifest),
        *([measured] if measured else []),
        "## Loading",
        _loading(manifest, path),
        "## Serving",
        _serving(family, path),
    ]
    return sign("\n\n".join(parts) + "\n")


def sign(text: str) -> str:
    """Returns the text followed by its hash."""
    return text + SIGNATURE.format(hashlib.sha256(text.encode()).hexdigest()[:16])


def body(text: str) -> str | None:
    """Returns a card without its hash, None if it was edited or not written by draftsmith."""
    unsigned, _, _ = text.rpartition(SIGNATURE.partition("{}")[0])
    return unsigned if unsigned and sign(unsigned) == text else None


def keep_edited(old: Path, new: Path) -> str | None:
    """Copies hand-edited READMEs from the folder `old` to `new`; returns the name of the latest copy, None if none."""
    for file in sorted(old.glob(f"{KEPT}*.md")) if old != new else ():
        shutil.copy(inside(old, file.name), new)
    edited = inside(old, CARD)
    if not edited.is_file() or body(edited.read_text(errors="replace")) is not None:
        return None
    names = (f"{KEPT}{number if number > 1 else ''}.md" for number in count(1))
    name = next(name for name in names if not (new / name).exists())
    shutil.copy(edited, new / name)
    return name


def warn_of_kept(folder: Path, name: str | None) -> None:
    """Warns that a hand-edited README of the folder was kept as `name`; does nothing if that is None."""
    if name is not None:
        warnings.warn(f"{folder / CARD} was edited by hand; it is kept as {name} beside the new one", stacklevel=3)


def rewrite(folder: Path, manifest: dict[str, Any], measured: str = "") -> str | None:
    """Rewrites the card in an artifact's folder; returns the name under which a hand-edited one is kept."""
    text, kept = card(manifest, folder / WEIGHTS, measured=measured), keep_edited(folder, folder)
    staging = folder / f".{CARD}.part"
    staging.write_text(text)
    staging.replace(folder / CARD)
    return kept


def for_hub(folder: Path, manifest: dict[str, Any], name: str) -> str:
    """Returns the card in an artifact's folder, loading it from the repository `name` unless it was edited by hand."""
    file = inside(folder, CARD)
    text = file.read_text() if file.is_file() else card(manifest, folder / WEIGHTS)
    unsigned = body(text)
    return text if unsigned is None else sign(unsigned.replace(PLACEHOLDER, name))


def num_parameters(file: Path) -> int:
    """Returns the number of parameters in a safetensors file, from its header; raises ValueError if it is truncated."""
    try:
        with safe_open(file, framework="pt") as tensors:
            return sum(prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{file} is truncated or not a safetensors file ({error})") from error


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Returns the rows of a comparison's `bakeoff.json`; raises ValueError if the file is anything else."""
    try:
        rows = json_text.read(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}); name the bakeoff.json of a comparison") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) and row.keys() >= ROW_KEYS for row in rows):
        raise ValueError(f"{path} is not a comparison, or lacks parts of one; name the bakeoff.json of one")
    return rows


def measured_section(rows: Sequence[dict[str, Any]], names: Sequence[str], family: str) -> str:
    """Returns the section with the rows of a comparison (`bakeoff.json`) for the drafter called one of `names`.

    Raises ValueError if the comparison has no such drafter of this family.
    """
    own = [row for row in rows if row["drafter"] in names and row["family"] == family]
    if not own:
        others = ", ".join(sorted({str(row["drafter"]) for row in rows if row["family"] and not row["is_ablation"]}))
        raise ValueError(f"no drafter called {names[0]} of family {family} was compared; the drafters are: {others}")
    first = own[0]
    conditions = (
        f"{first['num_prompts']} prompts, {first['max_new_tokens']} new tokens each, {first['dtype']}, on"
        f" {first['hardware']}, {first['threads']} thread(s); {first['rounds']} rounds, commit {first['commit']},"
        f" torch {first['torch']}, transformers {first['transformers_version']}."
    )
    head = ("temperature", "batch", "mean accepted length (tau)", "tok/s", "speed-up", "predicted speed-up", "output")
    table = _table([(*head, "accepted per depth, %"), *(tuple(_measurements(row)) for row in own)])
    return f"## Measured\n\n{conditions}\n\n{table}"


def _measurements(row: dict[str, Any]) -> Iterator[str]:
    yield from (f"{row['temperature']:g}", str(row["batch_size"]), f"{row['tau']:.2f}", f"{row['tokens_per_s']:,.0f}")
    yield f"{row['speedup']:.2f}x" + " slower" * (row["speedup"] < 0.995)
    yield f"{row['predicted_speedup']:.2f}x" if row.get("predicted_speedup") else ""
    output = "identical" if row["identical"] else "lossless" if row["identical"] is None else "DIFFERS"
    yield output if row["lossless"] else "lossy"
    yield " ".join(f"{100 * share:.0f}" for share in row["accepted_per_depth"][:5])


def _guarantee(manifest: dict[str, Any]) -> str:
    if manifest.get("acceptance_mode", "lossless") != "lossless":
        return f"It is lossy ({manifest['acceptance_mode']}): the output may differ from the target's."
    if manifest.get("tunes_target"):
        return (
            "It has fine-tuned its target: it is lossless for the fine-tuned target, whose output may differ from the"
            " original's."
        )
    return (
        "It is lossless: the output is the target's own, token for token at temperature 0 and in distribution when"
        " sampled."
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
        yield _table(
            [("metric", "mean"), *((name, "" if value is None else f"{value:.4g}") for name, value in measured.items())]
        )


def _loading(manifest: dict[str, Any], path: str) -> str:
    name = json.dumps(manifest["target"]["name"])
    target = "drafter.target" if manifest.get("tunes_target") else "target"
    return f"""```python
import draftsmith

target = draftsmith.Target.from_pretrained({name})
drafter = draftsmith.load({json.dumps(path)}, target)
ids = target.tokenizer("some text", return_tensors="pt")["input_ids"]
out = draftsmith.generate({target}, ids, drafter, max_new_tokens=64)
print(target.tokenizer.decode(out.sequences[0]))
```

or `draftsmith generate --target {manifest["target"]["name"]} --draft {path} "some text"`."""


def _serving(family: str, path: str) -> str:
    engines = ("transformers", *find(family).Drafter.serving_engines)
    commands = "\n".join(f"draftsmith export {path} --to {engine} OUT" for engine in engines)
    return f"```\n{commands}\n```\n\nEach writes a folder for that engine, and prints the command that starts it."


def _table(lines: Sequence[Sequence[str]]) -> str:
    """Returns a Markdown table with the first line as its header, without lines that are empty after their name."""
    rows = ["| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines]
    kept = [row for row, line in zip(rows[1:], lines[1:], strict=True) if any(line[1:])]
    return "\n".join([rows[0], "|" + " --- |" * len(lines[0]), *kept])
