"""Shared code of the families that draft from text and from stored arrays."""

from pathlib import Path

import numpy as np

from draftsmith.artifacts.files import inside
from draftsmith.core.drafter import Session


def source_tokens(session: Session) -> list[list[int]]:
    """Returns each row's source token ids for an encoder-decoder target, and empty lists for others."""
    source = session.source
    if source is None:
        return [[] for _ in session.rows]
    return [ids[mask].tolist() for ids, mask in zip(source.tokens_BT, source.mask_BT.bool(), strict=True)]


def load_array(file: Path, *, mmap: bool = False) -> np.ndarray:
    """Returns the array of an .npy file, memory-mapped with `mmap`; raises ValueError if it cannot be read."""
    try:
        return np.load(inside(file.parent, file.name), mmap_mode="r" if mmap else None, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{file} is missing or truncated ({error}); the artifact must be made again") from error
