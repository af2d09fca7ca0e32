"""What a run has told wandb offline, read from its file."""

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record


def read_wandb(file: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Returns what was logged, and the config, of a run that has been finished, once wandb's process has written it."""
    began, records = time.monotonic(), list[Record]()
    while not any(record.HasField("exit") for record in records):
        assert time.monotonic() - began < 60
        time.sleep(0.1)
        records = list(_records(file.read_bytes()))
    told = [
        {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.history.item
    ]
    updates = [update for record in records for update in (*record.run.config.update, *record.config.update)]
    return told, {update.key or update.nested_key[0]: json.loads(update.value_json) for update in updates}


def _records(raw: bytes) -> Iterator[Record]:
    """Yields the records that are whole, from blocks of 32 KiB and parts with headers of 7 bytes."""
    place, whole = 7, b""
    while place + 7 <= len(raw):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        _, size, kind = struct.unpack("<IHB", raw[place : place + 7])
        place += 7 + size
        if place > len(raw):
            return
        whole += raw[place - size : place]
        if kind in (1, 4):  # all of it, or the last part
            yield Record.FromString(whole)
            whole = b""
