"""Compresses a target into a smaller draft model: a transformers folder, and an artifact that drafts with it.

    ./launch.sh compress                                            # half of the pocket's layers, into runs/compress
    ./launch.sh compress --method width --keep 0.5 --target T --data runs/mine --output runs/narrow
    ./launch.sh compress --method wanda --pattern 2:4               # zeros for sparse kernels
    ./launch.sh compress --method int8                              # by torchao
    ./launch.sh compress --method mask --mask runs/layerskip        # removes the sublayers found by a layerskip run
    ./launch.sh distill --init runs/compress --loss forward_kl      # heals it; with --keep-zeros if it is sparse

`compression.json` lists the layers, heads and neurons kept. `artifact/` in the output folder drafts with the
compressed model before healing. Quantisation needs torchao: pip install -e '.[quantised]'.

Shared CPU core, pocket target: half a minute. Four of eight layers by least influence: 4.0 M of 7.0 M weights, a token
at 0.59 of a step, held-out acceptance 0.66; healed by 300 steps (`distill --loss forward_kl --learning-rate 1e-3` on
1.27 M tokens of the target's text) 0.86, where a new model of the same shape reaches 0.36.
"""

import dataclasses
import json
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
from trainers.training import launchers
from trainers.training.evaluation import MetricSums
from trainers.training.settings import parse_settings

HELD_OUT_BATCHES = 4


def make_artifact(folder: Path, settings: CompressSettings, output: Path | None = None) -> Path:
    """Returns the artifact that drafts with a compressed model, `folder`/artifact by default; makes it if missing."""
    output = output or folder / "artifact"
    if (output / MANIFEST).is_file():
        return output
    target = Target.from_pretrained(settings.target, dtype="float32")
    # Weights are quantised when an artifact is loaded, so it stores the weights of the source.
    scheme = settings.method if settings.method in SCHEMES else ""
    drafter_settings = distill.Settings(init=settings.source if scheme else str(folder))

    def build() -> Any:
        drafter = distill.build(drafter_settings, target).eval().requires_grad_(False)
        drafter.config = dataclasses.replace(drafter.config, quantised=scheme)
        return drafter

    drafter = build()
    drafter.on_weights_loaded()
    acceptance = held_out_acceptance(drafter, held_out_batches(settings, target), target)
    compression = json.loads((folder / MARKER).read_text())
    record = {"measured_acceptance": acceptance, "compression": compression, "train_s": 0.0}
    draftsmith.save(build(), output, target=target, record=record)
    rate, agreement = acceptance["acceptance"], acceptance["greedy_agreement"]
    print(f"{output}: held-out acceptance {rate:.3f}, greedy agreement {agreement:.3f}")
    return output


def held_out_batches(settings: CompressSettings, target: Target) -> list[Batch]:
    """Returns batches of rows that compression did not use, with the target's last hidden states."""
    options: dict[str, Any] = {**settings.batch_options(), "is_held_out": True}
    batches = calibration.batches(open_examples(settings.data, target), HELD_OUT_BATCHES, **options)
    return [complete(batch, target, (target.num_layers,)) for batch in batches]


@torch.inference_mode()
def held_out_acceptance(drafter: Any, batches: list[Batch], target: Target) -> dict[str, float]:
    """Returns the acceptance and the greedy agreement of a drafter on held-out batches."""
    sums = MetricSums()
    for batch in batches:
        metrics = distill.evaluate(drafter, batch, distill.Settings(), target)
        sums.add({name: metrics[name] for name in ("acceptance", "greedy_agreement")})
    return sums.means()


if __name__ == "__main__":
    with launchers.user_errors():
        (settings,) = parse_settings(CompressSettings, description=__doc__)
        make_artifact(compress(settings), settings)
