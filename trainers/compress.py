"""Compresses a target: fewer layers, heads or neurons, weights set to zero, or weights in fewer bits.

What comes of it is an ordinary transformers folder; `compression.json` in it says what is left of the source.
"""

import copy
import dataclasses
import json
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, TorchAoConfig

from data import POCKET
from data.batches import Batch
from data.examples import check_target, open_examples
from draftsmith import Target
from draftsmith.artifacts.artifact import check_fits, read_manifest
from draftsmith.artifacts.files import atomic_folder, check_replaceable
from draftsmith.artifacts.provenance import run_provenance
from draftsmith.core.model_info import TargetInfo, read_target_info
from draftsmith.parts.neural import quantised
from trainers.compression import calibration, importance, pruning, sparsity
from trainers.training import launchers
from trainers.training.run_settings import DEFAULT_DATA, RunSettings

MARKER = "compression.json"
FORMAT_VERSION = 1
LAYERS = ("influence", "angular", "even", "mask")
WIDTHS = ("width", "heads", "kv_heads", "neurons")
ZEROS = ("wanda", "magnitude")
TWO_OF_FOUR = "2:4"


@dataclass(frozen=True, kw_only=True)
class CompressSettings:
    """What is compressed, how, and the text that tells what would be missed least."""

    target: str = str(POCKET)
    """Transformers folder or hub name of the model to draft for; the pocket target by default."""
    model: str = ""
    """Model of the target's vocabulary that is compressed, the target itself if empty: one that was compressed and
    healed before, perhaps."""
    data: str = DEFAULT_DATA
    """Text to judge by: a folder of pseudo-data, a teacher store, or any source of text; written first if default."""
    output: str = "runs/compress"
    """Folder for the smaller model."""
    method: str = field(default="influence", metadata={"choices": [*LAYERS, *WIDTHS, *ZEROS, *quantised.SCHEMES]})
    """Leave out layers: of least influence, the neighbours over which states turn least (angular), evenly spaced ones,
    or those that `mask` skips. Narrow: query heads and neurons (width), either alone, or key-value heads with their
    queries. Set weights to zero. Or keep them in fewer bits."""
    keep: float = 0.5
    """Share that stays of layers, of heads in each group and of neurons, or of weights that may be zero; `mask` and
    fewer bits pay no heed to it."""
    mask: str = ""
    """Artifact that drafts without some sublayers, whose choice `mask` makes permanent where it is of whole layers."""
    pattern: str = field(default="any", metadata={"choices": ["any", TWO_OF_FOUR]})
    """Where zeros lie: anywhere, or two in each four neighbours, for which GPUs have kernels."""
    max_steps: int = 64
    """Batches of text read at most."""
    batch_size: int = 8
    """Rows in one."""
    max_length: int = 512
    """Longer rows are cut to so many tokens."""
    seed: int = 0
    """Of the choice of rows."""
    bf16: bool = False
    """Read the text in bfloat16; weights are written in the dtype they had in any case."""

    def __post_init__(self) -> None:
        for name, least in (("max_steps", 1), ("batch_size", 1), ("max_length", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        if not 0 < self.keep < 1:
            raise ValueError(f"keep is {self.keep}; it must lie between 0 and 1, both excluded")
        if bool(self.mask) != (self.method == "mask"):
            raise ValueError("method mask and --mask ARTIFACT, whose layers it leaves out, go together")
        if self.pattern == TWO_OF_FOUR and (self.method not in ZEROS or self.keep != 0.5):
            raise ValueError(f"pattern {TWO_OF_FOUR} keeps 0.5 of the weights, by magnitude or wanda")
        if self.method in quantised.SCHEMES:
            quantised.check(self.method)

    def reading(self) -> dict[str, Any]:
        """Returns how text is read."""
        return {name: getattr(self, name) for name in ("batch_size", "max_length", "seed")}

    @property
    def source(self) -> str:
        """What is compressed."""
        return self.model or self.target


@dataclass(frozen=True, kw_only=True)
class Compressed:
    """A smaller model, and what it kept of the larger one; None means all."""

    model: Any
    kept_layers: list[int] | None = None
    kept_heads: list[list[int]] | None = None
    """Query heads of each layer."""
    kept_kv_heads: list[list[int]] | None = None
    kept_neurons: list[list[int]] | None = None
    scores: dict[str, list[float]] = field(default_factory=dict)
    """What the choice of layers was made by."""


def compress(settings: CompressSettings) -> Path:
    """Returns the folder of the smaller model; says so and does nothing if it is there, made with the same settings.

    Raises ValueError, before weights load wherever they are not needed to tell, for a method that does not fit the
    architecture, for a share that leaves nothing or all, and for a folder that contains other files.
    """
    output = Path(settings.output).resolve()
    facts = _check_source(settings)
    launchers.write_default_data(RunSettings(target=settings.target, data=settings.data))
    examples = open_examples(settings.data, facts)
    kept = {key: value for key, value in asdict(settings).items() if key != "output"}
    identity = json.loads(json.dumps(kept | {"data_fingerprint": examples.fingerprint}))
    if _is_there(output, identity):
        print(f"{output} holds what these very settings make: nothing is left to do")
        return output
    dtype = "bfloat16" if settings.bf16 else "float32"
    source = Target.from_pretrained(settings.source, dtype=dtype)
    if not settings.model:
        check_target(examples, settings.data, source)
    batches = calibration.batches(examples, settings.max_steps, **settings.reading())
    made = _compressed(settings, source, batches)
    manifest = _manifest(settings, source, made, identity, batches)
    stored = AutoConfig.from_pretrained(settings.source).dtype or torch.float32
    with atomic_folder(output, marker=MARKER) as folder:
        model = made.model if settings.method in quantised.SCHEMES else made.model.to(stored)
        model.save_pretrained(folder)
        if source.tokenizer is not None:
            source.tokenizer.save_pretrained(folder)
        manifest["bytes"] = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        (folder / MARKER).write_text(json.dumps(manifest, indent=1) + "\n")
    print(f"{output}: {summary(manifest)}")
    return output


def summary(manifest: dict[str, Any]) -> str:
    """Returns what is left, in a line."""
    parts = [f"{manifest['num_parameters'] / 1e6:.2f} M of {manifest['source']['num_parameters'] / 1e6:.2f} M weights"]
    if manifest["kept_layers"] is not None:
        parts.append(f"layers {', '.join(map(str, manifest['kept_layers']))}")
    if manifest["num_zeros"]:
        parts.append(f"{manifest['num_zeros'] / 1e6:.2f} M of them zero, which saves no time on dense kernels")
    if manifest["method"] == "int4":
        parts.append("four bits take a byte each, for torchao packs them for CUDA and XPU alone")
    return f"{'; '.join(parts)}; {manifest['bytes'] / 1e6:.1f} MB"


def _compressed(settings: CompressSettings, source: Target, batches: list[Batch]) -> Compressed:
    if settings.method in LAYERS:
        return _fewer_layers(settings, source, batches)
    if settings.method in WIDTHS:
        return _narrower(settings, source, batches)
    if settings.method in ZEROS:
        # The one that was loaded is still to be named by its fingerprint.
        own = Target(copy.deepcopy(source.model), source.tokenizer)
        is_two_of_four = settings.pattern == TWO_OF_FOUR
        if settings.method == "wanda":
            sparsity.prune_by_wanda(own, batches, settings.keep, is_two_of_four=is_two_of_four)
        else:
            sparsity.prune_by_magnitude(own.model, settings.keep, is_two_of_four=is_two_of_four)
        return Compressed(model=own.model)
    scheme = TorchAoConfig(quantised.config_of(source.model, settings.method))
    model = AutoModelForCausalLM.from_pretrained(settings.source, dtype="auto", quantization_config=scheme)
    return Compressed(model=model.eval())


def _fewer_layers(settings: CompressSettings, source: Target, batches: list[Batch]) -> Compressed:
    num_layers, scores = source.num_layers, dict[str, list[float]]()
    if settings.method == "mask":
        check_fits(settings.mask, read_manifest(settings.mask), source)
        kept = _unmasked(settings.mask, num_layers)
        return Compressed(model=pruning.keep_layers(source.model, kept), kept_layers=kept)
    number = pruning.num_kept(settings.keep, num_layers, "layers")
    if settings.method == "influence":
        scores = {"influence": importance.block_influence(source, batches)}
        kept = pruning.drop_least_influential(scores["influence"], number)
    elif settings.method == "angular":
        scores = {"angular": importance.angular_distance(source, batches, num_layers - number)}
        kept = pruning.drop_span(scores["angular"], number, num_layers)
    else:
        kept = pruning.evenly_spaced(number, num_layers)
    model = pruning.keep_layers(source.model, kept)
    return Compressed(model=model, kept_layers=kept, scores=scores)


def _narrower(settings: CompressSettings, source: Target, batches: list[Batch]) -> Compressed:
    num_heads, num_kv_heads, _ = pruning.head_counts(source.model)
    group = num_heads // num_kv_heads
    kept: dict[str, list[list[int]]] = {}
    heads_LH, neurons_LF = importance.activations(source, batches)
    if settings.method in ("width", "heads"):
        number = pruning.num_kept(settings.keep, group, "query heads of each key-value head", is_exact=True)
        kept["heads"] = [pruning.top_indices_in_groups(one_H, number, num_kv_heads) for one_H in heads_LH]
    if settings.method == "kv_heads":
        number = pruning.num_kept(settings.keep, num_kv_heads, "key-value heads", is_exact=True)
        groups_LK = heads_LH.unflatten(-1, (num_kv_heads, group)).norm(dim=-1)
        kept["kv_heads"] = [pruning.top_indices_in_groups(one_K, number, 1) for one_K in groups_LK]
        kept["heads"] = [[kv * group + place for kv in one for place in range(group)] for one in kept["kv_heads"]]
    if settings.method in ("width", "neurons"):
        number = pruning.num_kept(settings.keep, neurons_LF.shape[1], "neurons")
        kept["neurons"] = [pruning.top_indices_in_groups(one_F, number, 1) for one_F in neurons_LF]
    return Compressed(
        model=pruning.narrow(source.model, **kept),
        kept_heads=kept.get("heads"),
        kept_kv_heads=kept.get("kv_heads"),
        kept_neurons=kept.get("neurons"),
    )


def _unmasked(mask: str, num_layers: int) -> list[int]:
    """Returns the layers that an artifact's choice of sublayers does not skip whole."""
    config = read_manifest(mask)["config"]
    attention, mlp = (set(config.get(name) or ()) for name in ("attention", "mlp"))
    whole, halves = attention & mlp, attention ^ mlp
    if not whole:
        raise ValueError(f"{mask} skips no layer whole, and a configuration has no layers without attention or MLP")
    if halves:
        print(f"{mask} skips half of layers {', '.join(map(str, sorted(halves)))}, which stay whole")
    kept = [layer for layer in range(num_layers) if layer not in whole]
    if not kept:
        raise ValueError(f"{mask} skips every layer: nothing would be left")
    return kept


def _check_source(settings: CompressSettings) -> TargetInfo:
    """Returns the target's facts; raises ValueError for what cannot be compressed for it."""
    target = read_target_info(settings.target)
    source = read_target_info(settings.source) if settings.model else target
    if source.is_encoder_decoder:
        raise ValueError(f"{settings.source} is an encoder-decoder; only causal models are compressed")
    if (source.vocab_size, source.tokenizer_hash) != (target.vocab_size, target.tokenizer_hash):
        raise ValueError(f"--model {settings.model} has another vocabulary than target {settings.target}")
    if source.is_quantised:
        raise ValueError(f"{settings.source} is quantised already; compress the model it was made from")
    if settings.mask:
        _unmasked(settings.mask, source.num_layers)
    return target


def _is_there(output: Path, identity: dict[str, Any]) -> bool:
    """Returns whether a folder holds what these settings make; raises ValueError if it contains other files."""
    check_replaceable(output, marker=MARKER)
    if not (output / MARKER).is_file():
        return False
    made = json.loads((output / MARKER).read_text())["settings"]
    faults = [f"{key} was {made.get(key)}, is {value}" for key, value in identity.items() if made.get(key) != value]
    if faults:
        raise ValueError(f"{output} was made with other settings ({'; '.join(faults)}); name another --output")
    return True


def _manifest(
    settings: CompressSettings, source: Target, made: Compressed, identity: dict[str, Any], batches: list[Batch]
) -> dict[str, Any]:
    kept = {name.name: getattr(made, name.name) for name in dataclasses.fields(made) if name.name != "model"}
    lengths = [length for batch in batches for length in batch.lengths_B.tolist()]
    before = Path(settings.source) / MARKER
    return {
        "format_version": FORMAT_VERSION,
        "method": settings.method,
        **kept,
        "num_parameters": num_weights(made.model),
        "num_zeros": sparsity.num_zeros(made.model) if settings.method in ZEROS else 0,
        "source": {
            "name": source.name,
            "fingerprint": source.fingerprint,
            "num_parameters": num_weights(source.model),
            "compression": json.loads(before.read_text()) if before.is_file() else None,
        },
        "tokenizer_hash": source.tokenizer_hash,
        "calibration": {"data": settings.data, "num_rows": len(lengths), "num_tokens": sum(lengths)},
        "settings": identity,
        "torchao": version("torchao") if settings.method in quantised.SCHEMES else None,
    } | run_provenance()


def num_weights(model: Any) -> int:
    """Returns how many weights a model has, each shared one counted once."""
    return sum(parameter.numel() for parameter in model.parameters())
