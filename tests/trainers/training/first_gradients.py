"""Trains like recipes/medusa.py and writes the gradient of the first step to `gradients.safetensors` in its output."""

import sys
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from trainers import medusa
from trainers.training import gradient
from trainers.training.loop import train
from trainers.training.run_settings import RunSettings
from trainers.training.settings import parse_settings


class GradientSaver(gradient.CheckpointSchedule):
    """Saves the gradients before the first optimiser step."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step == 0 and state.is_world_process_zero:
            gradients = {name: weight.grad.clone() for name, weight in model.named_parameters()}
            save_file(gradients, Path(args.output_dir).parent / "gradients.safetensors")


if __name__ == "__main__":
    gradient.CheckpointSchedule = GradientSaver  # type: ignore[misc]
    settings, run = parse_settings(medusa.Settings, RunSettings, description=None, argv=sys.argv[1:])
    train(medusa, settings, run)
