"""One recipe under plain python, torchrun and the deepspeed launcher, on GPUs or, with gloo, on CPU."""

import importlib.util
import os
import shlex
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch
import transformers

from data.pseudo_data import read_pseudo_data
from trainers.training.run_settings import DEFAULT_DATA, RunSettings

RECIPES = Path(__file__).resolve().parents[2] / "recipes"


def rank() -> int:
    """Returns this process's number among all of the run's."""
    return int(os.environ.get("RANK", "0"))


def num_ranks() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def device() -> str:
    """Returns this process's own device."""
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"


def from_rank_0(found: dict[str, float]) -> dict[str, float]:
    """Returns what rank 0 found, on every rank; numbers that ranks measure differ."""
    shared = [found]
    if torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(shared)
    return shared[0]


def begin(run: RunSettings) -> str | None:
    """Makes this process ready for its launcher and returns the path of the DeepSpeed config, None without one.

    Raises ValueError for a config that is not there and for packages that are asked for and not installed.
    """
    transformers.logging.set_verbosity_error()
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed warns, wherever it is installed
    if rank() != 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for the rest of the process
    require(run.report_to == "wandb", "wandb", "--report-to wandb")
    require(bool(run.deepspeed), "deepspeed", "--deepspeed")
    if run.report_to == "wandb":
        os.environ.setdefault("WANDB_PROJECT", run.wandb_project)
    if not run.deepspeed:
        return None
    path = Path(run.deepspeed) if Path(run.deepspeed).is_file() else RECIPES / "deepspeed" / f"{run.deepspeed}.json"
    if not path.is_file():
        known = ", ".join(sorted(config.stem for config in path.parent.glob("*.json")))
        raise ValueError(f"--deepspeed {run.deepspeed}: there is no such file, and it is none of {known}")
    _prepare_deepspeed()
    return str(path)


def require(is_wanted: bool, package: str, flag: str) -> None:
    """Raises ValueError if `flag` asks for a package that is not installed."""
    if is_wanted and importlib.util.find_spec(package) is None:
        raise ValueError(f"{flag} needs {package}, which is not installed: pip install {package}")


def write_default_data(run: RunSettings) -> None:
    """Has the target write the default data if it is to be read and is not there or not finished."""
    if run.data != DEFAULT_DATA:
        return
    while not _is_readable(Path(run.data)):
        if os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(1)
            continue
        command = [sys.executable, str(RECIPES / "pseudo_data.py"), "--target", run.target, "--output", run.data]
        print(f"{run.data} is not there yet, so the target writes it first: {shlex.join(command)}", flush=True)
        if subprocess.run(command).returncode != 0:
            raise ValueError(f"{run.data} could not be written; see above")


def leave_deepspeed() -> None:
    """Lets models be built whole again, which transformers would otherwise shard at birth under ZeRO-3."""
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()


def end() -> None:
    """Ends the process group once all ranks are here, so that none outlives the others' sockets."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def _is_readable(folder: Path) -> bool:
    try:
        read_pseudo_data(folder)
    except ValueError:
        return False
    return True


def _prepare_deepspeed() -> None:
    """Lets DeepSpeed start under plain python too, and without compiling kernels of its own on CPU."""
    if "RANK" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    if not torch.cuda.is_available():
        import deepspeed.ops

        # Its shared-memory reduction costs a minute of g++; gloo does the same.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
