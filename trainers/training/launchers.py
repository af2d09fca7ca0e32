"""Support for the launchers of a recipe: plain python, torchrun and deepspeed, on GPUs or, with gloo, on CPU."""

import importlib.util
import os
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import torch
import transformers
from tqdm import tqdm

from data.pseudo_data import read_pseudo_data
from data.shards import Share
from draftsmith.artifacts import files
from trainers.training.run_settings import DEFAULT_DATA, RunSettings

RECIPES = Path(__file__).resolve().parents[2] / "recipes"


def rank() -> int:
    """Returns the rank of this process in the run, 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def num_ranks() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def device() -> str:
    """Returns the device of this process."""
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"


def begin_share(*, is_lockstep: bool = False) -> Share:
    """Prepares this process of a run whose processes share its shards, and returns its share; only rank 0 prints."""
    if rank() != 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for the rest of the process
    return Share(rank=rank(), num_ranks=num_ranks(), is_lockstep=is_lockstep)


def broadcast_from_rank_0(values: dict[str, float]) -> dict[str, float]:
    """Returns the values of rank 0 on every rank, since measured values differ between ranks."""
    shared = [values]
    if torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(shared)
    return shared[0]


def begin(run: RunSettings) -> str | None:
    """Prepares this process for its launcher and returns the path of the DeepSpeed config, None without DeepSpeed.

    Raises ValueError for a config that does not exist and for packages that are needed and not installed.
    """
    transformers.logging.set_verbosity_error()
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed, where installed, warns otherwise
    begin_share()
    require(run.report_to == "wandb", "wandb", "--report-to wandb")
    require(bool(run.deepspeed), "deepspeed", "--deepspeed")
    if run.report_to == "wandb":
        os.environ.setdefault("WANDB_PROJECT", run.wandb_project)
    if not run.deepspeed:
        return None
    path = Path(run.deepspeed) if Path(run.deepspeed).is_file() else RECIPES / "deepspeed" / f"{run.deepspeed}.json"
    if not path.is_file():
        known = ", ".join(sorted(config.stem for config in path.parent.glob("*.json")))
        raise ValueError(f"--deepspeed {run.deepspeed}: no such file; give a path or one of {known}")
    _prepare_deepspeed()
    return str(path)


@contextmanager
def user_errors() -> Iterator[None]:
    """Ends a recipe with one sentence on standard error for an error of its user (status 1) and for Ctrl-C (130)."""
    name = Path(sys.argv[0]).name
    try:
        yield
        sys.stdout.flush()
    except ValueError as error:
        _exit(f"{name}: {error}", 1)
    except BrokenPipeError:
        files.end_quietly()
    except KeyboardInterrupt as error:
        # The last note is that of the outermost folder.
        _exit("; ".join([f"{name}: interrupted", *getattr(error, "__notes__", [])[-1:]]), 130)
    except OSError as error:
        _exit(f"{name}: {files.system_fault(error)}", 1)
    except Exception as error:
        if fault := files.storage_fault(error):
            _exit(f"{name}: {fault}", 1)
        raise


def _exit(sentence: str, status: int) -> NoReturn:
    for bar in list(tqdm._instances):  # else they would write another line when they are deleted
        bar.close()
    print(sentence, file=sys.stderr)
    sys.exit(status)


def require(is_used: bool, package: str, flag: str) -> None:
    """Raises ValueError if `flag` is used and its package is not installed."""
    if is_used and importlib.util.find_spec(package) is None:
        raise ValueError(f"{flag} needs {package}, which is not installed: pip install {package}")


def write_default_data(run: RunSettings) -> None:
    """Generates the default data with the target if the run reads it and it is missing or unfinished."""
    if run.data != DEFAULT_DATA:
        return
    if run.tensor_parallel and not _is_readable(Path(run.data)):
        raise ValueError(f"there is no {run.data} yet; write it first: ./launch.sh pseudo_data --tensor-parallel ...")
    while not _is_readable(Path(run.data)):
        if os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(1)
            continue
        command = [sys.executable, str(RECIPES / "pseudo_data.py"), "--target", run.target, "--output", run.data]
        command += ["--device-map", run.device_map] if run.device_map else []
        print(f"{run.data} does not exist yet; generating it with the target: {shlex.join(command)}", flush=True)
        if subprocess.run(command).returncode != 0:
            raise ValueError(f"{run.data} could not be generated; see the messages above")


def disable_sharded_init() -> None:
    """Makes transformers build complete models again, which it would shard at construction under ZeRO-3."""
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()


def end() -> None:
    """Waits for all ranks and destroys the process group, so that no rank loses its connection to another."""
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
    """Lets DeepSpeed run under plain python, and on CPU without compiling its own kernels."""
    if "RANK" not in os.environ:
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            port = str(sock.getsockname()[1])
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    if not torch.cuda.is_available():
        import deepspeed.ops

        # Its shared-memory reduction takes a minute of g++ to compile; gloo serves instead.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
