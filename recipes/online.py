"""Serves prompts of a new domain with a drafter that is trained online, beside the same drafter without training.

    ./launch.sh online --draft runs/lstm --data .venv/lib/python3.12/site-packages/networkx/algorithms
    ./launch.sh online --draft runs/distill --target T --data requests.jsonl --temperature 1 --every 4

For each block of requests it prints first-token acceptance and mean accepted length of the frozen drafter and of the
one trained online (2310.07177), and plots both in `curves.png`. The output folder holds the trained drafter as an
artifact. The same command continues an interrupted run.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

import draftsmith
from data import POCKET
from data.folder_lock import locked
from data.prompts import TextSettings, load_prompts, prompt_room
from data.shards import first_run_time, open_folder
from draftsmith import Target
from draftsmith.artifacts.artifact import MANIFEST, check_fits, read_manifest
from draftsmith.core.stats import GenerationStats
from draftsmith.loading.model_info import read_target_info
from eval.plots.curves import Panel, publish_curves
from trainers.online import Online, OnlineSettings
from trainers.training import launchers
from trainers.training.settings import parse_settings

MARKER = "online.json"
FIRST, TAU = "First drafted token accepted", "Tokens a target forward"
"""Keys of the metrics in the artifact's record."""
TITLES = {FIRST: "First-token acceptance rate", TAU: "Mean accepted length (tau)"}


@dataclass(frozen=True, kw_only=True)
class ServingSettings:
    """The requests, and how they are served."""

    draft: str = "runs/lstm"
    """Artifact of the drafter to train."""
    target: str = str(POCKET)
    """Its target: a transformers folder, GGUF file, named target or hub name."""
    data: str = "python-source"
    """Source of the prompts of the requests."""
    text: TextSettings = field(default_factory=TextSettings)
    """Settings for reading rows of text."""
    output: str = "runs/online"
    """Folder for the artifact and the curves."""
    max_prompts: int = 400
    """Number of requests; 0 for all."""
    block: int = 50
    """Requests per block; metrics are averaged and everything is saved after each block."""
    max_steps: int = 0
    """Maximum number of blocks, for a quick trial; 0 for all."""
    max_new_tokens: int = 64
    """New tokens per request."""
    temperature: float = 0.0
    """Sampling temperature; 0 is greedy."""
    seed: int = 0
    """Random seed of the choice of prompts and of sampling."""

    def __post_init__(self) -> None:
        if self.block < 1:
            raise ValueError(f"block is {self.block}; it must be at least 1")


def main(serving: ServingSettings, settings: OnlineSettings) -> None:
    output, target_info = Path(serving.output), read_target_info(serving.target)
    check_fits(serving.draft, read_manifest(serving.draft), target_info)
    room = prompt_room(target_info, serving.max_new_tokens)
    now = first_run_time(output, MARKER)
    prompts = load_prompts(
        serving.data,
        target_info.tokenizer,
        max_prompts=serving.max_prompts,
        max_prompt_tokens=room,
        is_encoder_decoder=target_info.is_encoder_decoder,
        settings=serving.text,
        now=now,
        seed=serving.seed,
    )
    identity = {**asdict(serving), **asdict(settings), "output": None, "max_steps": None}
    identity["text"] = serving.text.chat_template_kwargs or None
    target = Target.from_pretrained(serving.target, dtype="float32")
    with locked(output):
        open_folder(output, MARKER, identity, notes={"template_time": now.isoformat()})
        saved = output / "artifact" if (output / "artifact" / MANIFEST).is_file() else None
        served = read_manifest(saved)["served"] if saved else []
        frozen = draftsmith.load(serving.draft, target)
        online = Online(draftsmith.load(saved or serving.draft, target), settings)
        if served:
            online.load_optimizer(_state(output, len(served)))
            online.num_steps = served[-1]["steps"]
        begins = range(0, len(prompts), serving.block)[: serving.max_steps or None]
        for begin in tqdm(begins[len(served) :], desc="serving", unit="block", initial=len(served), total=len(begins)):
            found: dict[str, list[GenerationStats]] = {"frozen": [], "online": []}
            for at, prompt in enumerate(prompts[begin : begin + serving.block], begin):
                ids = torch.tensor([prompt.ids], device=target.device)
                for name, drafter in (("frozen", frozen), ("online", online)):
                    out = draftsmith.generate(
                        target,
                        ids,
                        drafter,
                        max_new_tokens=serving.max_new_tokens,
                        temperature=serving.temperature,
                        seed=at,
                        length="fixed",
                    )
                    found[name].append(out.stats)
            online.learn()
            served.append({"steps": online.num_steps, **{name: _metrics(stats) for name, stats in found.items()}})
            online.save_optimizer(_state(output, len(served)))
            online.save(output / "artifact", record={"served": served, "settings": identity})
            _state(output, len(served) - 1).unlink(missing_ok=True)
            tqdm.write("; ".join(f"{name} {one}" for name, one in served[-1].items()))
        panels = []
        for metric, title in TITLES.items():
            lines = {name: [(block["steps"], block[name][metric]) for block in served] for name in ("frozen", "online")}
            panels.append(Panel(title=title, lines=lines))
        publish_curves(panels, output)
        print(f"The trained drafter is {output}/artifact; {output}/curves.png shows its metrics over the requests")


def _state(output: Path, number: int) -> Path:
    return output / f"optimiser-{number}.safetensors"


def _metrics(stats: list[GenerationStats]) -> dict[str, float]:
    accepted, drafted = (sum(sum(getattr(one, name)[:1]) for one in stats) for name in ("accepted", "drafted"))
    tau = sum(one.new_tokens for one in stats) / max(sum(one.steps for one in stats), 1)
    return {FIRST: round(accepted / max(drafted, 1), 4), TAU: round(tau, 4)}


if __name__ == "__main__":
    with launchers.user_errors():
        main(*parse_settings(ServingSettings, OnlineSettings, description=__doc__))
