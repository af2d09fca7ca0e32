r"""Measures how fast pseudo-data is written by this checkout and by an earlier commit, side by side.

    .venv/bin/python benchmarks/pseudo_data.py --target smollm2 --dtype bfloat16 --data prompts.jsonl \
        --vllm-python .venv-serving/bin/python

Each version writes the same prompts with its own recipes/pseudo_data.py, in turn, `repeats` times. The rate is that of
generated tokens between the manifest and the last shard, so that loading the target does not count; memory is the
process's largest resident set. With `--vllm-python` vLLM alone writes the prompts of the same rows, too; its engine's
start does not count either.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import pyarrow.parquet

from data import POCKET
from draftsmith.loading.target_names import model_folder
from trainers.training.settings import parse_settings

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True, kw_only=True)
class BenchmarkSettings:
    """What is written, and with what it is compared."""

    before: str = "8f876b6"
    """The earlier commit."""
    target: str = str(POCKET)
    """Transformers folder, or name of a target."""
    dtype: str = "auto"
    """Dtype in which the weights are loaded."""
    data: str = "python-source:train"
    """Source of the prompts."""
    max_prompts: int = 216
    """Number of prompts."""
    max_new_tokens: int = 128
    """Maximum number of new tokens per row."""
    batch_size: int = 32
    """Number of rows that run together."""
    temperature: str = "0"
    """Sampling temperature."""
    num_threads: int = 2
    """Threads of each process."""
    repeats: int = 3
    """Runs of each version."""
    vllm_python: str = ""
    """Python of an environment with vLLM, as `./launch.sh serving-test` makes it."""


def checkout(commit: str, folder: Path) -> Path:
    """Unpacks a commit of this repository into `folder`."""
    archive = subprocess.run(["git", "-C", ROOT, "archive", commit], check=True, capture_output=True).stdout
    with tarfile.open(fileobj=BytesIO(archive)) as files:
        files.extractall(folder, filter="data")
    return folder


def run_recipe(root: Path, command: list[str], num_threads: int) -> resource.struct_rusage:
    """Runs a recipe of a checkout and returns the resources that it used; raises ValueError if it fails."""
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": str(num_threads)}
    process = subprocess.Popen(
        [sys.executable, *command],
        cwd=root,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    message = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise ValueError(f"{root}: {message.strip().splitlines()[-1]}")
    return usage


def measure(root: Path, output: Path, settings: BenchmarkSettings) -> tuple[float, float, int]:
    """Writes pseudo-data with one checkout; returns (tokens per second, largest resident set in MiB, rows)."""
    command = ["recipes/pseudo_data.py", "--output", str(output), "--dtype", settings.dtype]
    command += [
        "--target",
        str(Path(found).resolve() if Path(found := model_folder(settings.target)).exists() else found),
    ]
    command += ["--data", str(Path(settings.data).resolve()) if Path(settings.data).exists() else settings.data]
    for name in ("max_prompts", "max_new_tokens", "batch_size", "temperature"):
        command += [f"--{name.replace('_', '-')}", str(getattr(settings, name))]
    usage = run_recipe(root, command, settings.num_threads)
    shards = sorted(output.glob("*.parquet"))
    (manifest,) = output.glob("_*.json")
    seconds = max(shard.stat().st_mtime for shard in shards) - manifest.stat().st_mtime
    prompts, num_tokens = read_rows(output)
    return (num_tokens - sum(map(len, prompts))) / seconds, usage.ru_maxrss / 1024, len(prompts)


def read_rows(output: Path) -> tuple[list[list[int]], int]:
    """Returns the prompts of the rows written, and the number of tokens with their texts."""
    table = pyarrow.parquet.read_table(output, columns=["ids", "num_prompt_tokens"])
    rows = table["ids"].to_pylist()
    prompts = [ids[:count] for ids, count in zip(rows, table["num_prompt_tokens"].to_pylist(), strict=True)]
    return prompts, sum(map(len, rows))


def measure_vllm(prompts: list[list[int]], folder: Path, settings: BenchmarkSettings) -> tuple[float, float, int]:
    """Writes the same rows with vLLM; returns what `measure` does."""
    folder.mkdir()
    request = {
        "target": str(Path(model_folder(settings.target)).resolve()),
        "dtype": settings.dtype,
        "prompts": prompts,
        "max_new_tokens": settings.max_new_tokens,
        "max_tokens": max(map(len, prompts)) + settings.max_new_tokens,
        "batch_size": settings.batch_size,
        "temperature": float(settings.temperature),
    }
    (folder / "request.json").write_text(json.dumps(request))
    command = [settings.vllm_python, str(ROOT / "benchmarks" / "vllm_text.py"), str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": str(settings.num_threads)}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    if run.returncode:
        raise ValueError(f"{settings.vllm_python}: {run.stderr.strip().splitlines()[-1]}")
    rate, peak, num_rows = json.loads((folder / "response.json").read_text())
    return rate, peak, num_rows


def main(settings: BenchmarkSettings) -> None:
    with tempfile.TemporaryDirectory() as folder:
        roots = {settings.before: checkout(settings.before, Path(folder) / "before"), "this checkout": ROOT}
        found: dict[str, list[tuple[float, float, int]]] = {name: [] for name in roots}
        for turn in range(settings.repeats):
            for name, root in roots.items():
                found[name].append(measure(root, Path(folder) / f"{root.name}-{turn}", settings))
                print_line(name, found[name][-1])
            if settings.vllm_python:
                prompts, _ = read_rows(Path(folder) / f"{ROOT.name}-{turn}")
                print_line("vLLM", measure_vllm(prompts, Path(folder) / f"vllm-{turn}", settings))
    rates, peaks = ([statistics.median(run[index] for run in runs) for runs in found.values()] for index in range(2))
    print(f"medians: {rates[1] / rates[0]:.2f} times the tokens/s, {peaks[1] / peaks[0]:.2f} times the memory")


def print_line(name: str, measured: tuple[float, float, int]) -> None:
    rate, peak, num_rows = measured
    print(f"{name}: {rate:,.0f} tokens/s, {peak:,.0f} MiB, {num_rows} rows", flush=True)


if __name__ == "__main__":
    main(*parse_settings(BenchmarkSettings, description=__doc__))
