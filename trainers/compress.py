"""Compresses a target: fewer layers, heads or neurons, weights set to zero, or weights in fewer bits.

The result is an ordinary transformers folder; `compression.json` in it records what was kept of the source.
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
from draftsmith.artifacts import json_text
from draftsmith.artifacts.artifact import check_fits, read_manifest
from draftsmith.artifacts.files import atomic_folder, check_replaceable
from draftsmith.artifacts.provenance import run_provenance
from draftsmith.loading import remote_code
from draftsmith.loading.model_info import TargetInfo, read_target_info
from draftsmith.loading.precision import cast
from draftsmith.loading.target_names import model_folder
from draftsmith.parts.checks import check_at_least
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
    """The model, the compression method, and the calibration text."""

    target: str = str(POCKET)
    """The model to draft for: a transformers folder, GGUF file, named target (smollm2, pocket) or hub name."""
    model: str = ""
    """Model with the target's vocabulary that is compressed, such as one compressed and retrained before; empty for the
    target itself."""
    data: str = DEFAULT_DATA
    """Calibration text: a folder of pseudo-data, a teacher store, or any source of text; the default is generated if
    missing."""
    output: str = "runs/compress"
    """Folder for the compressed model."""
    method: str = field(default="influence", metadata={"choices": [*LAYERS, *WIDTHS, *ZEROS, *quantised.SCHEMES]})
    """Remove layers: the least influential, the neighbours over which hidden states rotate least (angular), all but
    evenly spaced ones, or those that --mask skips. Remove query heads and neurons (width), either alone, or key-value
    heads with their query heads. Set weights to zero, or quantise them."""
    keep: float = 0.5
    """Fraction kept of layers, of heads in each group and of neurons, or of nonzero weights; not used by mask and
    quantisation."""
    mask: str = ""
    """Artifact that skips some sublayers; method mask removes the layers that it skips as a whole."""
    pattern: str = field(default="any", metadata={"choices": ["any", TWO_OF_FOUR]})
    """Positions of zeros: any, or two in every four neighbours, for which GPUs have kernels."""
    max_steps: int = 64
    """Largest number of calibration batches."""
    batch_size: int = 8
    """Rows per batch."""
    max_length: int = 512
    """Largest number of tokens per row; longer rows are truncated."""
    seed: int = 0
    """Seed of the choice of rows."""
    bf16: bool = False
    """Read the text in bfloat16; weights are saved in their original dtype in any case."""

    def __post_init__(self) -> None:
        check_at_least(self, 1, "max_steps", "batch_size")
        check_at_least(self, 2, "max_length")
        if not 0 < self.keep < 1:
            raise ValueError(f"keep is {self.keep}; it must lie between 0 and 1, both excluded")
        if bool(self.mask) != (self.method == "mask"):
            raise ValueError("method mask and --mask ARTIFACT, whose skipped layers it removes, must be given together")
        if self.pattern == TWO_OF_FOUR and (self.method not in ZEROS or self.keep != 0.5):
            raise ValueError(f"pattern {TWO_OF_FOUR} keeps 0.5 of the weights, by magnitude or wanda")
        if self.method in quantised.SCHEMES:
            quantised.check(self.method)

    def batch_options(self) -> dict[str, Any]:
        """Returns the options of the calibration batches."""
        return {name: getattr(self, name) for name in ("batch_size", "max_length", "seed")}

    @property
    def source(self) -> str:
        """The model that is compressed."""
        return self.model or self.target


@dataclass(frozen=True, kw_only=True)
class Compressed:
    """A compressed model, and the indices kept of the original; None means all."""

    model: Any
    kept_layers: list[int] | None = None
    kept_heads: list[list[int]] | None = None
    """Query heads of each layer."""
    kept_kv_heads: list[list[int]] | None = None
    kept_neurons: list[list[int]] | None = None
    scores: dict[str, list[float]] = field(default_factory=dict)
    """Scores that the choice of layers is based on."""


def compress(settings: CompressSettings) -> Path:
    """Returns the folder of the compressed model, which is kept if it was made with the same settings.

    Raises ValueError, before weights load where possible, for a method that does not fit the architecture, for a
    fraction that keeps nothing or all, and for a folder that contains other files.
    """
    output = Path(settings.output).resolve()
    model_info = _check_source(settings)
    launchers.write_default_data(RunSettings(target=settings.target, data=settings.data))
    examples = open_examples(settings.data, model_info)
    kept = {key: value for key, value in asdict(settings).items() if key != "output"}
    identity = json.loads(json.dumps(kept | {"data_fingerprint": examples.fingerprint}))
    if _is_there(output, identity):
        print(f"{output} was already made with these settings")
        return output
    dtype = "bfloat16" if settings.bf16 else "float32"
    source = Target.from_pretrained(settings.source, dtype=dtype)
    if not settings.model:
        check_target(examples, settings.data, source)
    batches = calibration.batches(examples, settings.max_steps, **settings.batch_options())
    made = _compressed(settings, source, batches)
    manifest = _manifest(settings, source, made, identity, batches)
    trusted = remote_code.is_allowed()
    stored = AutoConfig.from_pretrained(model_folder(settings.source), trust_remote_code=trusted).dtype or torch.float32
    with atomic_folder(output, marker=MARKER) as folder:
        model = made.model if settings.method in quantised.SCHEMES else cast(made.model, stored)
        model.save_pretrained(folder)
        if source.tokenizer is not None:
            source.tokenizer.save_pretrained(folder)
        manifest["bytes"] = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        (folder / MARKER).write_text(json_text.text_of(manifest, indent=1) + "\n")
    print(f"{output}: {summary(manifest)}")
    return output


def summary(manifest: dict[str, Any]) -> str:
    """Returns a one-line summary of the compressed model."""
    parts = [f"{manifest['num_parameters'] / 1e6:.2f} M of {manifest['source']['num_parameters'] / 1e6:.2f} M weights"]
    if manifest["kept_layers"] is not None:
        parts.append(f"layers {', '.join(map(str, manifest['kept_layers']))}")
    if manifest["num_zeros"]:
        parts.append(f"{manifest['num_zeros'] / 1e6:.2f} M of them zero, which saves no time on dense kernels")
    if manifest["method"] == "int4":
        parts.append("each 4-bit weight takes a byte, as torchao packs them on CUDA and XPU only")
    return f"{'; '.join(parts)}; {manifest['bytes'] / 1e6:.1f} MB"


def _compressed(settings: CompressSettings, source: Target, batches: list[Batch]) -> Compressed:
    if settings.method in LAYERS:
        return _fewer_layers(settings, source, batches)
    if settings.method in WIDTHS:
        return _narrower(settings, source, batches)
    if settings.method in ZEROS:
        # A copy, because the source's fingerprint is still needed.
        own = Target(copy.deepcopy(source.model), source.tokenizer)
        is_two_of_four = settings.pattern == TWO_OF_FOUR
        if settings.method == "wanda":
            sparsity.prune_by_wanda(own, batches, settings.keep, is_two_of_four=is_two_of_four)
        else:
            sparsity.prune_by_magnitude(own.model, settings.keep, is_two_of_four=is_two_of_four)
        return Compressed(model=own.model)
    scheme = TorchAoConfig(quantised.config_of(source.model, settings.method))
    model = AutoModelForCausalLM.from_pretrained(
        model_folder(settings.source),
        dtype="auto",
        quantization_config=scheme,
        trust_remote_code=remote_code.is_allowed(),
    )
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
        kept["heads"] = [[kv * group + offset for kv in one for offset in range(group)] for one in kept["kv_heads"]]
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
    """Returns the layers of which an artifact does not skip both sublayers."""
    config = read_manifest(mask)["config"]
    attention, mlp = (set(config.get(name) or ()) for name in ("attention", "mlp"))
    whole, halves = attention & mlp, attention ^ mlp
    if not whole:
        raise ValueError(f"{mask} skips no layer as a whole; layers without attention or MLP cannot be saved")
    if halves:
        print(f"{mask} skips half of layers {', '.join(map(str, sorted(halves)))}, which are kept as a whole")
    kept = [layer for layer in range(num_layers) if layer not in whole]
    if not kept:
        raise ValueError(f"{mask} skips every layer; no layer would be left")
    return kept


def _check_source(settings: CompressSettings) -> TargetInfo:
    """Returns the information on the model; raises ValueError if it cannot be compressed for the target."""
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
    """Returns True if the folder was made with these settings; raises ValueError if it contains other files."""
    check_replaceable(output, marker=MARKER)
    if not (output / MARKER).is_file():
        return False
    made = json_text.read(output / MARKER)["settings"]
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
            "compression": json_text.read(before) if before.is_file() else None,
        },
        "tokenizer_hash": source.tokenizer_hash,
        "calibration": {"data": settings.data, "num_rows": len(lengths), "num_tokens": sum(lengths)},
        "settings": identity,
        "torchao": version("torchao") if settings.method in quantised.SCHEMES else None,
    } | run_provenance()


def num_weights(model: Any) -> int:
    """Returns the number of weights of a model, shared ones counted once."""
    return sum(parameter.numel() for parameter in model.parameters())
