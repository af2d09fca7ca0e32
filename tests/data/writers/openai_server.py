"""A server with the API of OpenAI that runs a tiny target."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

import draftsmith
from draftsmith import Target


class OpenAIServer(ThreadingHTTPServer):
    """Serves a tiny model over /v1/completions; the first `num_failures` requests fail."""

    daemon_threads = True

    def __init__(self, target: Target) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.target = target
        self.lock = threading.Lock()
        self.requests: list[dict[str, Any]] = []
        self.num_active = self.max_active = self.num_failures = 0
        self.returns_ids, self.status, self.truncates = True, 503, False
        self.eos: tuple[int, ...] = ()
        self.extra: dict[str, Any] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: OpenAIServer

    def do_GET(self) -> None:
        self.answer(200, {"data": [{"id": "tiny"}]})

    def do_POST(self) -> None:
        server = self.server
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.num_active += 1
            server.max_active = max(server.max_active, server.num_active)
            server.requests.append(request)
            fails = server.num_failures > 0
            server.num_failures -= fails
        time.sleep(0.02)
        if fails:
            self.answer(server.status, {"error": "out of luck"})
        else:
            self.answer(200, {"choices": [self.choice(request)]})
        with server.lock:
            server.num_active -= 1

    def choice(self, request: dict[str, Any]) -> dict[str, Any]:
        target = self.server.target
        prompt = request["prompt"]
        ids = prompt if isinstance(prompt, list) else target.tokenizer(prompt)["input_ids"]
        with self.server.lock:
            out = draftsmith.generate(
                target,
                torch.tensor([ids]),
                max_new_tokens=request["max_tokens"],
                temperature=request["temperature"],
                seed=request["seed"],
                eos_token_id=self.server.eos,
            )
        new = out.sequences[0, len(ids) :].tolist()
        choice = {
            "text": target.tokenizer.decode(new, skip_special_tokens=True),
            "finish_reason": "stop" if new[-1] in self.server.eos else "length",
        }
        choice |= self.server.extra
        return choice | {"token_ids": new} if self.server.returns_ids and request.get("return_token_ids") else choice

    def answer(self, status: int, body: dict[str, Any]) -> None:
        payload = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload[:9] if self.server.truncates else payload)

    def log_message(self, *_: Any) -> None:
        pass
