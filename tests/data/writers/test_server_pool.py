"""Several servers: all are kept busy, and the work of one that dies is taken by the others."""

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from data.writers import server_pool
from data.writers.server import ServerWriter
from data.writers.server_pool import ServerPool
from tests.support.text import trained_tokenizer


class Server(ThreadingHTTPServer):
    """Answers with its name; `status` is that of its answers, `delay_s` their duration."""

    daemon_threads = True

    def __init__(self, name: str) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.name, self.model, self.status, self.delay_s = name, "tiny", 200, 0.01
        self.num_requests = self.num_active = self.max_active = 0
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def die(self) -> None:
        """Refuses connections from now on."""
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.answer({"data": [{"id": self.server.model}]})

    def do_POST(self) -> None:
        server = self.server
        self.rfile.read(int(self.headers["Content-Length"]))
        with server.lock:
            server.num_requests += 1
            server.num_active += 1
            server.max_active = max(server.max_active, server.num_active)
        time.sleep(server.delay_s)
        with server.lock:
            server.num_active -= 1
        self.answer({"from": server.name})

    def answer(self, body: dict[str, Any]) -> None:
        payload = json.dumps(body).encode()
        self.send_response(self.server.status)
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def servers(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Server]]:
    monkeypatch.setattr(server_pool, "FIRST_WAIT_S", 0.005)
    running = [Server(name) for name in "abc"]
    yield running
    for one in running:
        one.die()


def post(pool: ServerPool, number: int, num_threads: int = 12) -> list[str]:
    """Returns who answered each of `number` requests, sent from several threads."""
    answers, indices = [], iter(range(number))

    def work() -> None:
        for _ in indices:
            answers.append(pool.post("/v1/completions", {})["from"])

    threads = [threading.Thread(target=work) for _ in range(num_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


def test_requests_go_to_the_server_with_the_fewest_in_flight(servers: list[Server]) -> None:
    servers[2].delay_s = 0.1
    pool = ServerPool([one.url for one in servers], num_in_flight=3, attempts=3)
    answers = post(pool, 90)
    assert len(answers) == 90
    assert answers.count("c") < min(answers.count("a"), answers.count("b")), "a slow one gets fewer"
    assert [one.max_active for one in servers] == [3, 3, 3]


def test_a_server_that_dies_is_reported_and_the_others_take_its_work(
    servers: list[Server], capsys: pytest.CaptureFixture[str]
) -> None:
    pool = ServerPool([one.url for one in servers], num_in_flight=3, attempts=3)
    threading.Timer(0.05, servers[1].die).start()
    answers = post(pool, 150)
    assert len(answers) == 150 and 0 < answers.count("b") < 50
    reported = capsys.readouterr().err.splitlines()
    assert len(reported) == 1, "once"
    assert f"{servers[1].url} is left out from now on: no valid answer after 3 attempts (" in reported[0]
    assert "2 of 3 servers take its requests" in reported[0]


def test_a_server_that_fails_for_a_while_is_taken_back(servers: list[Server]) -> None:
    pool = ServerPool([one.url for one in servers[:2]], num_in_flight=2, attempts=8)
    servers[0].status = 503
    threading.Timer(0.03, lambda: setattr(servers[0], "status", 200)).start()
    answers = post(pool, 80)
    assert len(answers) == 80 and answers[-30:].count("a") > 5


def test_no_answer_is_an_error_when_none_is_left(servers: list[Server]) -> None:
    pool = ServerPool([one.url for one in servers[:2]], num_in_flight=2, attempts=2)
    for one in servers[:2]:
        one.status = 500
    with pytest.raises(ValueError, match=r"no valid answer from http.* or http.*/v1/completions after 2 attempts: 500"):
        pool.post("/v1/completions", {})


def test_addresses_and_models_are_checked(servers: list[Server]) -> None:
    tokenizer, (first, second, _) = trained_tokenizer(), servers
    assert ServerWriter(f"{first.url}, {second.url}/v1/", tokenizer).model == "tiny"
    second.model = "other"
    for url, message in (
        (f"{first.url},{second.url}", "servers must serve the same model, and serve: .* tiny, .* other; name one"),
        (f"{first.url},{first.url}/v1", "--server names .* 2 times; name each server once"),
        (f"{first.url},localhost:1", "--server localhost:1: expected an address like"),
        (",", "--server names no address"),
        (f"{first.url},http://127.0.0.1:9", "no valid answer from http://127.0.0.1:9/v1/models"),
    ):
        with pytest.raises(ValueError, match=message):
            ServerWriter(url, tokenizer)
