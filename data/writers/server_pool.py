"""Sends HTTP requests to one or several servers of the same model: `ServerPool`."""

import http.client
import json
import os
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

RETRIED_STATUS = {408, 409, 425, 429, 500, 502, 503, 504}
TIMEOUT_S = 600.0
FIRST_WAIT_S = 0.5


@dataclass(kw_only=True, eq=False)
class _Server:
    url: str
    num_active: int = 0
    """Requests in flight."""
    num_failures: int = 0
    """Failures in a row; those of requests that were in flight together count once."""
    failed_at: float = 0.0
    retry_at: float = 0.0
    is_left_out: bool = False


class NoAnswer(Exception):
    """A server gave no valid answer this time, for a reason that may pass."""


class ServerPool:
    """Sends each request to the server with the fewest in flight, `num_in_flight` at most to each.

    After a temporary error a server rests, for times that double, and others take its requests. One that fails
    `attempts` times in a row is reported and left out from then on. Threads may share a pool. The API key is
    $DRAFTSMITH_SERVER_KEY. Raises ValueError for addresses that are none or named twice.
    """

    def __init__(self, urls: Sequence[str], *, num_in_flight: int, attempts: int) -> None:
        for url in urls:
            if not url.startswith(("http://", "https://")):
                raise ValueError(f"--server {url}: expected an address like http://localhost:8000")
        if not urls:
            raise ValueError("--server names no address; expected one like http://localhost:8000")
        self.urls = [url.rstrip("/").removesuffix("/v1") for url in urls]
        if repeated := [url for url in self.urls if self.urls.count(url) > 1]:
            raise ValueError(
                f"--server names {repeated[0]} {self.urls.count(repeated[0])} times; name each server once"
            )
        self.num_in_flight, self.attempts = num_in_flight, attempts
        self._servers = [_Server(url=url) for url in self.urls]
        self._changed = threading.Condition()

    def ask_each(self, path: str) -> list[dict[str, Any]]:
        """Returns every server's answer to a GET request, which is not repeated; raises ValueError without one."""
        answers = []
        for url in self.urls:
            try:
                answers.append(_answer(url + path, None))
            except NoAnswer as error:
                raise ValueError(f"no valid answer from {url}{path}: {error}") from None
        return answers

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Returns a server's JSON answer; raises ValueError if one rejects the request or none answers it."""
        reason, data = "", json.dumps(body).encode()
        num_attempts = self.attempts * len(self._servers)
        for _ in range(num_attempts):
            server = self._take()
            begun = time.monotonic()
            try:
                answer = _answer(server.url + path, data)
            except NoAnswer as error:
                reason = str(error)
                if not self._release(server, failure=reason, begun=begun):
                    raise self._no_answer(path, reason, self.attempts) from None
            except BaseException:
                self._release(server)
                raise
            else:
                self._release(server)
                return answer
        raise self._no_answer(path, reason, num_attempts)

    def _take(self) -> _Server:
        """Waits for a server that is free and does not rest."""
        with self._changed:
            while True:
                now = time.monotonic()
                live = [server for server in self._servers if not server.is_left_out]
                free = [one for one in live if one.retry_at <= now and one.num_active < self.num_in_flight]
                if free:
                    server = min(free, key=lambda one: one.num_active)
                    server.num_active += 1
                    return server
                self._changed.wait(min((one.retry_at - now for one in live if one.retry_at > now), default=None))

    def _release(self, server: _Server, *, failure: str = "", begun: float = 0.0) -> bool:
        """Ends a request, which `failure` says failed; returns False if it was the last server's last attempt."""
        with self._changed:
            server.num_active -= 1
            self._changed.notify_all()
            if not failure:
                server.num_failures = 0
                return True
            if begun >= server.failed_at:
                server.failed_at, server.num_failures = time.monotonic(), server.num_failures + 1
                server.retry_at = server.failed_at + FIRST_WAIT_S * 2 ** (server.num_failures - 1)
            if server.num_failures < self.attempts or server.is_left_out:
                return True
            num_left = sum(not one.is_left_out for one in self._servers if one is not server)
            if not num_left:
                return False
            server.is_left_out = True
            tqdm.write(
                f"{server.url} is left out from now on: no valid answer after {self.attempts} attempts ({failure});"
                f" {num_left} of {len(self._servers)} servers take its requests",
                file=sys.stderr,
            )
            return True

    def _no_answer(self, path: str, reason: str, num_attempts: int) -> ValueError:
        tries = f" after {num_attempts} attempts" if num_attempts > 1 else ""
        return ValueError(f"no valid answer from {' or '.join(self.urls)}{path}{tries}: {reason}")


def _answer(address: str, data: bytes | None) -> dict[str, Any]:
    """Returns the JSON that a server answers; raises NoAnswer for temporary errors, ValueError if it rejects."""
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("DRAFTSMITH_SERVER_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    try:
        request = urllib.request.Request(address, data=data, headers=headers)
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
            return json.loads(response.read())
    except urllib.error.HTTPError as error:
        reason = f"{error.code} {' '.join(error.read().decode(errors='replace').split()):.300}"
        if error.code not in RETRIED_STATUS:
            raise ValueError(f"{address} rejected the request: {reason}") from None
        raise NoAnswer(reason) from None
    except (OSError, ValueError, http.client.HTTPException) as error:  # no connection, or it was cut short
        raise NoAnswer(str(error) or type(error).__name__) from None
