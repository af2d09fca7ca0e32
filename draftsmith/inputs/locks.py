"""Keeps threads from using the same drafter at the same time: `exclusive`."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from draftsmith.core.drafter import Drafter

_CHANGED = threading.Condition()
_THREADS: dict[int, int] = {}
"""By the id of each object in use, the thread that uses it."""


@contextmanager
def exclusive(*objects: Any) -> Iterator[None]:
    """Waits until no other thread uses any of the objects, then keeps them for this thread while the block runs.

    Raises ValueError if this thread uses one already, which it would wait for forever.
    """
    keys, thread = {id(one) for one in objects}, threading.get_ident()
    with _CHANGED:
        if any(_THREADS.get(key) == thread for key in keys):
            raise ValueError(
                "this drafter is in the middle of another call of generate in the same thread, such as one whose"
                " streamer makes this call; load the artifact a second time for it"
            )
        _CHANGED.wait_for(lambda: keys.isdisjoint(_THREADS))
        _THREADS.update(dict.fromkeys(keys, thread))
    try:
        yield
    finally:
        with _CHANGED:
            for key in keys:
                del _THREADS[key]
            _CHANGED.notify_all()


def with_parts(drafter: Drafter) -> Iterator[Drafter]:
    """Yields a drafter and, if it is a composite, the drafters of its parts and theirs."""
    yield drafter
    for part in drafter.parts:
        yield from with_parts(part.drafter)
