"""Keeps threads from using the same drafter at the same time: `exclusive`."""

import gc
import threading
import time
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from draftsmith.core.drafter import Drafter

PATIENCE_S = 10.0
"""Seconds for which a stream may be paused before a call that waits for it says so."""
_CHANGED = threading.Condition()
_USES: dict[int, "Use"] = {}
"""By the id of each object in use, its use."""


class Use:
    """The use of objects by a call of `generate`, or by a stream, which is paused while its caller has a text."""

    def __init__(self) -> None:
        self.thread = threading.current_thread()
        self.paused_since_s: float | None = None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Marks a stream as paused until its caller asks for the next text, perhaps in another thread."""
        self.paused_since_s = time.monotonic()
        try:
            yield
        finally:
            self.paused_since_s, self.thread = None, threading.current_thread()


@contextmanager
def exclusive(*objects: Any) -> Iterator[Use]:
    """Waits until no other thread uses any of the objects, then keeps them for this thread while the block runs.

    Raises ValueError for what it would wait for forever: a use by this thread, and a paused stream whose thread has
    ended. Warns once of another stream that stays paused.
    """
    keys, use = {id(one) for one in objects}, Use()
    _wait(keys, use)
    try:
        yield use
    finally:
        with _CHANGED:
            for key in keys:
                del _USES[key]
            _CHANGED.notify_all()


def _wait(keys: Collection[int], use: Use) -> None:
    """Registers a use of the objects as soon as they are free."""
    is_collected, warned = False, set[Use]()
    while True:
        with _CHANGED:
            others = {_USES[key] for key in keys if key in _USES}
            if not others:
                _USES.update(dict.fromkeys(keys, use))
                return
            stuck = next((other for other in others if other not in warned and _is_stuck(other, use)), None)
            if stuck is None:
                _CHANGED.wait(PATIENCE_S)
                continue
        if not is_collected:
            # A stream that was dropped, but is part of a cycle of references, is closed by this.
            gc.collect()
            is_collected = True
            continue
        _report(stuck, use)
        warned.add(stuck)


def _is_stuck(other: Use, use: Use) -> bool:
    """Returns whether another use cannot end by itself, or has been paused for long."""
    is_paused = (since_s := other.paused_since_s) is not None and time.monotonic() - since_s >= PATIENCE_S
    return other.thread is use.thread or is_paused


def _report(other: Use, use: Use) -> None:
    """Warns of a stream that another thread may still read; raises ValueError for uses that nothing would end."""
    if other.paused_since_s is None:
        raise ValueError(
            "this drafter is in the middle of another call of generate in the same thread, such as one whose"
            " streamer makes this call; load the artifact a second time for it"
        )
    is_own, name = other.thread is use.thread, repr(other.thread.name)
    whose = "this thread" if is_own else f"thread {name}" + (", which has ended" if not other.thread.is_alive() else "")
    stream = (
        f"this drafter is in use by an open stream of generate_stream, last read by {whose}; read the stream to its"
        " end, close it with its method close(), or load the artifact a second time"
    )
    if is_own or not other.thread.is_alive():
        raise ValueError(stream)
    warnings.warn(f"waiting: {stream}", stacklevel=7)


def with_parts(drafter: Drafter) -> Iterator[Drafter]:
    """Yields a drafter and, if it is a composite, the drafters of its parts and theirs."""
    yield drafter
    for part in drafter.parts:
        yield from with_parts(part.drafter)
