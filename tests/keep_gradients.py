"""Trains like recipes/medusa.py and writes the gradient of the first step to `gradients.safetensors` in its output."""

import sys
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from trainers import descent, medusa
from trainers.loop import train
from trainers.run import RunSettings
from trainers.settings import parse_settings


class Keep(descent.Rhythm):
    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step == 0 and state.is_world_process_zero:
            gradients = {name: weight.grad.clone() for name, weight in model.named_parameters()}
            save_file(gradients, Path(args.output_dir).parent / "gradients.safetensors")


if __name__ == "__main__":
    descent.Rhythm = Keep  # type: ignore[misc]
    settings, run = parse_settings(medusa.Settings, RunSettings, description=None, argv=sys.argv[1:])
    train(medusa, settings, run)
