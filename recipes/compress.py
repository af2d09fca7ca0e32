"""Compresses a target into a smaller draft model: an ordinary transformers folder, and an artifact made of it.

    ./launch.sh compress                                            # half of the pocket's layers, into runs/compress
    ./launch.sh compress --method width --keep 0.5 --target T --data runs/mine --output runs/narrow
    ./launch.sh compress --method wanda --pattern 2:4               # zeros for sparse kernels
    ./launch.sh compress --method int8                              # by torchao
    ./launch.sh compress --method mask --mask runs/layerskip        # a searched choice of layers, made permanent
    ./launch.sh distill --init runs/compress --loss forward_kl      # heals it; --keep-zeros where it is sparse

`compression.json` says which layers, heads and neurons are left. `artifact/` in the output drafts for the target as
the model is, unhealed. Fewer bits need torchao: pip install -e '.[quantised]'.

A share of a CPU core, pocket target: half a minute. Four of eight layers by least influence: 4.0 M of 7.0 M weights, a
token at 0.59 of a step, held-out acceptance 0.66; healed by 300 steps (`distill --loss forward_kl --learning-rate 1e-3`
on 1.27 M tokens of the target's text) 0.86, where a new model of that very shape reaches 0.36.
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import torch

import draftsmith
from data.batches import Batch
from data.examples import open_examples
from data.teacher import complete
from draftsmith import Target
from draftsmith.artifacts.artifact import MANIFEST
from draftsmith.parts.neural.quantised import SCHEMES
from trainers import distill
from trainers.compress import MARKER, CompressSettings, compress
from trainers.compression import calibration
from trainers.training.evaluation import Sums
from trainers.training.settings import parse_settings

HELD_OUT_BATCHES = 4


def draft_with(folder: Path, settings: CompressSettings, output: Path | None = None) -> Path:
    """Returns the artifact that drafts with a compressed model, made unless it is there; `folder`/artifact if None."""
    output = output or folder / "artifact"
    if (output / MANIFEST).is_file():
        return output
    target = Target.from_pretrained(settings.target, dtype="float32")
    # Fewer bits are taken when an artifact is loaded: what is saved are the weights of the source.
    scheme = settings.method if settings.method in SCHEMES else ""
    how = distill.Settings(init=settings.source if scheme else str(folder))

    def made() -> Any:
        drafter = distill.build(how, target).eval().requires_grad_(False)
        drafter.config = dataclasses.replace(drafter.config, quantised=scheme)
        return drafter

    judged = made()
    judged.on_weights_loaded()
    acceptance = accepted(judged, held_out(settings, target), target)
    compression = json.loads((folder / MARKER).read_text())
    record = {"measured_acceptance": acceptance, "compression": compression, "train_s": 0.0}
    draftsmith.save(made(), output, target=target, record=record)
    print(f"{output}: held-out acceptance {acceptance['acceptance']:.3f}, greedy {acceptance['greedy_agreement']:.3f}")
    return output


def held_out(settings: CompressSettings, target: Target) -> list[Batch]:
    """Returns text that no choice was made by, with what the target says of it."""
    reading: dict[str, Any] = {**settings.reading(), "is_held_out": True}
    rows = calibration.batches(open_examples(settings.data, target), HELD_OUT_BATCHES, **reading)
    return [complete(batch, target, (target.num_layers,)) for batch in rows]


@torch.inference_mode()
def accepted(drafter: Any, batches: list[Batch], target: Target) -> dict[str, float]:
    """Returns how likely the target accepts a drafted token after its own text, and how often greedily."""
    sums = Sums()
    for batch in batches:
        found = distill.evaluate(drafter, batch, distill.Settings(), target)
        sums.add({name: found[name] for name in ("acceptance", "greedy_agreement")})
    return sums.means()


if __name__ == "__main__":
    try:
        (given,) = parse_settings(CompressSettings, description=__doc__)
        draft_with(compress(given), given)
    except ValueError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
