"""Reads the file that an offline wandb run writes."""

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record


def read_wandb(file: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Returns the logged rows and the config of a finished run, once wandb's process has written them."""
    began, records = time.monotonic(), list[Record]()
    while not any(record.HasField("exit") for record in records):
        assert time.monotonic() - began < 60
        time.sleep(0.1)
        records = list(_records(file.read_bytes()))
    logged = [
        {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.history.item
    ]
    updates = [update for record in records for update in (*record.run.config.update, *record.config.update)]
    return logged, {update.key or update.nested_key[0]: json.loads(update.value_json) for update in updates}


def _records(raw: bytes) -> Iterator[Record]:
    """Yields the complete records, which are split over blocks of 32 KiB into parts with headers of 7 bytes."""
    offset, record = 7, b""
    while offset + 7 <= len(raw):
        if 32768 - offset % 32768 < 7:
            offset += 32768 - offset % 32768
            continue
        _, size, kind = struct.unpack("<IHB", raw[offset : offset + 7])
        offset += 7 + size
        if offset > len(raw):
            return
        record += raw[offset - size : offset]
        if kind in (1, 4):  # a whole record, or its last part
            yield Record.FromString(record)
            record = b""
