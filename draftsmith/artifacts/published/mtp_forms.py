"""MTP heads that targets bring in their own checkpoints: which tensors they are, by the forms that published ones have.

transformers leaves these tensors out when it loads a target (`_keys_to_ignore_on_load_unexpected`).
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from draftsmith.artifacts import json_text
from draftsmith.loading.target_names import model_folder
from draftsmith.loading.weights import check_finite

INDEX, WEIGHTS = "model.safetensors.index.json", "model.safetensors"
LAYER, NORM = "model.layers.0.", "model.norm"
"""The names of the head's layer, and of the norm after it, in the checkpoint of a model of one layer."""


@dataclass(frozen=True, kw_only=True)
class Form:
    """How a kind of checkpoint names its heads, and what they read.

    `{number}` is a head's number from 0, `{behind}` the same after the target's number of blocks.
    """

    models: str
    """Models that have it."""
    head: str
    """Prefix of the head's tensors."""
    layer: str
    """Prefix of those of its layer."""
    names: Mapping[str, str]
    """The drafter's names by those after the prefix `head`, both without `.weight`."""
    copies: Mapping[str, str] = field(default_factory=dict)
    """Copies of the target's embedding and LM head, likewise."""
    renamed: Mapping[str, str] = field(default_factory=dict)
    """Modules of the layer that are called otherwise in the target's layers, and what they are called there."""
    layer_kind: str = ""
    """Kind of the layer's attention; empty for what the target's configuration says, or full attention."""
    mlp_kind: str = ""
    """Kind of its MLP, where the configuration names kinds; empty for what it says, or that of the target's last."""
    model_type: str = ""
    """The architecture of the layer in transformers; empty for the target's."""
    is_hidden_first: bool = False
    """Whether the projection's input is the hidden state and then the embedding; else the other way round."""
    is_chained: bool = True
    """Whether a head reads the output of the head before it; if not, the target's hidden state."""
    reads_normed: bool = True
    """Whether the target's hidden state is read after its final norm; if not, before it."""
    zeroes_first: bool = False
    """Whether position 0 reads zeros in place of an embedding, as vLLM and SGLang have it."""


FORMS = (
    Form(
        models="Qwen3-Next and Qwen3.5",
        head="mtp.",
        layer="mtp.layers.{number}.",
        names={
            "fc": "projection",
            "pre_fc_norm_embedding": "embedding_norm",
            "pre_fc_norm_hidden": "hidden_norm",
            "norm": NORM,
        },
    ),
    Form(
        models="DeepSeek-V3 and GLM-4.5",
        head="model.layers.{behind}.",
        layer="model.layers.{behind}.",
        names={
            "eh_proj": "projection",
            "enorm": "embedding_norm",
            "hnorm": "hidden_norm",
            "shared_head.norm": NORM,
        },
        copies={"embed_tokens": "embedding", "shared_head.head": "LM head"},
    ),
    Form(
        models="MiMo-V2",
        head="model.mtp.layers.{number}.",
        layer="model.mtp.layers.{number}.",
        names={"eh_proj": "projection", "enorm": "embedding_norm", "hnorm": "hidden_norm", "final_layernorm": NORM},
        renamed={"pre_mlp_layernorm": "post_attention_layernorm"},
        layer_kind="sliding_attention",
        mlp_kind="dense",
        is_chained=False,  # as SGLang's worker for several heads runs them
    ),
    Form(
        models="MiMo-7B",
        head="model.mtp_layers.{number}.",
        layer="model.mtp_layers.{number}.",
        names={
            "input_proj": "projection",
            "token_layernorm": "embedding_norm",
            "hidden_layernorm": "hidden_norm",
            "final_layernorm": NORM,
        },
        model_type="qwen2",
        is_hidden_first=True,
        reads_normed=False,
        zeroes_first=True,
    ),
)
"""The forms that are read."""


@dataclass(frozen=True, kw_only=True)
class Head:
    """An MTP head of a target's checkpoint."""

    folder: Path
    form: Form
    number: int
    """Its number, from 0."""
    num_layers: int
    """Number of the target's blocks."""
    files: dict[str, str]
    """The file of each of its tensors, by the tensor's name in the checkpoint."""
    num_heads: int
    """Number of heads in the checkpoint."""

    def prefix(self, of: str) -> str:
        return _prefix(of, self.num_layers, self.number)

    def read(self) -> dict[str, Tensor]:
        """Returns its tensors by their names in the checkpoint; raises ValueError if a file cannot be read."""
        tensors: dict[str, Tensor] = {}
        for file in sorted(set(self.files.values())):
            with _opened(self.folder / file) as opened:
                tensors |= {name: opened.get_tensor(name) for name in self.files if self.files[name] == file}
        check_finite(f"the MTP head in {self.folder}", tensors.items())
        return tensors

    def is_copy(self, name: str) -> bool:
        """Returns whether a tensor is a copy of the target's embedding or LM head."""
        return self._inner(name) in self.form.copies

    def ordinary_name(self, name: str) -> str:
        """Returns the drafter's name of a tensor outside the layer; of the others that in a model of one layer."""
        if (ours := self.form.names.get(self._inner(name))) is not None:
            return f"{ours}.weight"
        return LAYER + _renamed(name.removeprefix(self.prefix(self.form.layer)), self.form.renamed)

    def checkpoint_name(self, ordinary: str) -> str:
        """Returns the name in the checkpoint of what `ordinary_name` names."""
        for theirs, ours in self.form.names.items():
            if ordinary == f"{ours}.weight":
                return f"{self.prefix(self.form.head)}{theirs}.weight"
        renamed = {ours: theirs for theirs, ours in self.form.renamed.items()}
        return self.prefix(self.form.layer) + _renamed(ordinary.removeprefix(LAYER), renamed)

    def _inner(self, name: str) -> str:
        return name.removeprefix(self.prefix(self.form.head)).removesuffix(".weight")


def find(target: Any) -> list[Head]:
    """Returns the MTP heads in a target's checkpoint, none if that is no folder or has none of a known form.

    Of a form whose heads share a projection it is the first. `target` gives name and num_layers. Raises ValueError for
    a damaged index or file.
    """
    folder = Path(model_folder(target.name, needs_weights=False))
    files = _files_by_tensor(folder)
    for form in FORMS:
        count = _count(files, form, target.num_layers)
        numbers = range(count if "{" in form.head else min(count, 1))
        if numbers:
            return [
                Head(
                    folder=folder,
                    form=form,
                    number=number,
                    num_layers=target.num_layers,
                    files=_own_files(files, form, target.num_layers, number),
                    num_heads=count,
                )
                for number in numbers
            ]
    return []


def form_of(target: Any) -> Form | None:
    """Returns the form of the heads in a target's checkpoint, None if it has none."""
    heads = find(target)
    return heads[0].form if heads else None


def required(target: Any) -> list[Head]:
    """Returns what `find` does; raises ValueError if there is no folder, or no head of a known form in it."""
    if heads := find(target):
        return heads
    if not Path(model_folder(target.name, needs_weights=False)).is_dir():
        raise ValueError(
            f"target {target.name} is not a local folder, and its MTP head is read from the checkpoint's files:"
            " download it (hf download) and give --target its folder"
        )
    known = ", ".join(f"{form.head.format(number='N', behind='N')}* ({form.models})" for form in FORMS)
    raise ValueError(
        f"the checkpoint of {target.name} has no MTP head of a known form, {known}; train one from nothing with"
        " ./launch.sh mtp"
    )


def _files_by_tensor(folder: Path) -> dict[str, str]:
    """Returns the file of each tensor of a checkpoint, empty if it has no safetensors."""
    if (index := folder / INDEX).is_file():
        found = json_text.read(index)
        files = found.get("weight_map") if isinstance(found, dict) else None
        if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
            raise ValueError(f"{index} has no weight_map of tensors and their files; download the target again")
        return files
    if not (folder / WEIGHTS).is_file():
        return {}
    with _opened(folder / WEIGHTS) as opened:
        return dict.fromkeys(opened.keys(), WEIGHTS)


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file} is missing or truncated ({error}); download the target again") from error


def _prefix(of: str, num_layers: int, number: int) -> str:
    return of.format(number=number, behind=num_layers + number)


def _own_files(files: dict[str, str], form: Form, num_layers: int, number: int) -> dict[str, str]:
    """Returns the files of a head's tensors by their names."""
    head, layer = (_prefix(of, num_layers, number) for of in (form.head, form.layer))
    outer = {f"{head}{name}.weight" for name in (*form.names, *form.copies)}
    return {name: file for name, file in files.items() if name in outer or name.startswith(layer)}


def _count(files: dict[str, str], form: Form, num_layers: int) -> int:
    """Returns the number of heads of a form, 0 if the first has no projection."""
    projection = next(name for name, ours in form.names.items() if ours == "projection")
    numbers = itertools.takewhile(
        lambda number: (
            f"{_prefix(form.head, num_layers, number)}{projection}.weight" in files
            and any(name.startswith(_prefix(form.layer, num_layers, number)) for name in files)
        ),
        itertools.count(),
    )
    return len(list(numbers))


def _renamed(name: str, names: Mapping[str, str]) -> str:
    child, dot, rest = name.partition(".")
    return f"{names.get(child, child)}{dot}{rest}"
