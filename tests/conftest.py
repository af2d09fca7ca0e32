"""The suite runs offline, on CPU and on one thread a process, unless GPU tests are selected with `-m gpu`."""

import gc
import os

import pytest

os.environ |= {
    "DRAFTSMITH_OFFLINE": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "WANDB_MODE": "offline",
    "OMP_NUM_THREADS": "1",  # more threads than cores make steps many times slower
    "TOKENIZERS_PARALLELISM": "false",
    "MPLBACKEND": "Agg",
    # Freed memory is kept, as the kernel takes longer to hand out pages than many tests' arithmetic (glibc only).
    "MALLOC_MMAP_THRESHOLD_": str(2**29),
    "MALLOC_TRIM_THRESHOLD_": str(2**30),
}


def pytest_configure(config: pytest.Config) -> None:
    """Hides GPUs before torch is imported."""
    if config.option.markexpr != "gpu":
        os.environ |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}


def pytest_collection_finish() -> None:
    """Excludes modules and test items from garbage collection, which accelerate runs in full for each training.

    The texts of tests are short: a cache with room for 256 tokens takes longer to clear than to use.
    """
    from draftsmith.core import cache  # after the environment is set

    cache.FIRST_CAPACITY = 32
    gc.collect()
    gc.freeze()
