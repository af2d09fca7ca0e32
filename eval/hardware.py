"""Hardware and commit of a measurement, for the header of every table."""

import os
import platform
import subprocess
from pathlib import Path

import torch


def describe(device: torch.device, dtype: torch.dtype = torch.float32) -> str:
    """Returns the name of the GPU, or of the CPU with its number of cores, and whether it emulates `dtype`."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    slow = f", no {str(dtype).removeprefix('torch.')} instructions" if emulates(device, dtype) else ""
    return f"{_cpu_name()}, {os.cpu_count()} cores{slow}"


def emulates(device: torch.device, dtype: torch.dtype) -> bool:
    """Returns True if a CPU computes in `dtype` without instructions for it, so that several tokens cost several times.

    On a CPU with AVX2 alone a bfloat16 forward of 8 tokens takes five times as long as one of a single token, and in
    float32 twice as long.
    """
    is_native = {
        torch.bfloat16: torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported(),
        torch.float16: torch.cpu._is_amx_fp16_supported(),
    }
    return device.type == "cpu" and platform.machine() in ("x86_64", "AMD64") and not is_native.get(dtype, True)


def commit() -> str | None:
    """Returns this checkout's commit, marked `-dirty` where files differ from it; None outside one."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
