"""Pushing artifacts to a hub and loading them from it, with the real client and a local server that answers like it.

The Hugging Face hub itself is not contacted; only the answers that this server gives are tested.
"""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
import yaml

import draftsmith
from draftsmith.artifacts import model_card
from draftsmith.artifacts.artifact import read_manifest
from draftsmith.cli import main
from draftsmith.drafters import lookup, medusa
from tests.support.family import built
from tests.support.models import tiny_target

HEADS = medusa.Config(num_heads=2, num_blocks=1, tree=((0,), (0, 0)))
COMMIT = "c" * 40


class Hub:
    """A hub with repositories in memory, which answers the requests that the client makes."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.is_private: dict[str, bool] = {}
        self.tokens: set[str | None] = set()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                hub.tokens.add(self.headers.get("Authorization"))
                status, content, etag = hub.answer(self.path.partition("?")[0], self._body())
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                if etag:
                    self.send_header("ETag", f'"{etag}"')
                    self.send_header("X-Repo-Commit", COMMIT)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

            do_GET = do_POST = do_HEAD = answer

            def _body(self) -> bytes:
                if self.headers.get("Transfer-Encoding") != "chunked":
                    return self.rfile.read(int(self.headers.get("Content-Length") or 0))
                parts = []
                while size := int(self.rfile.readline(), 16):
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(parts)

            def log_message(self, *_: object) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def answer(self, path: str, body: bytes) -> tuple[int, bytes, str]:
        """Returns (status, content, ETag); the ETag is empty for anything but a file."""
        if path == "/api/repos/create":
            request = json.loads(body)
            name = f"{request['organization']}/{request['name']}"
            self.repos.setdefault(name, {})
            self.is_private[name] = request.get("visibility") == "private"
            return 200, json.dumps({"url": f"{self.address}/{name}"}).encode(), ""
        if path == "/api/validate-yaml":
            yaml.safe_load(json.loads(body)["content"].split("---\n")[1])
            return 200, b'{"errors": [], "warnings": []}', ""
        parts = path.removeprefix("/api/models").strip("/").split("/")
        name, rest = "/".join(parts[:2]), parts[2:]
        if name not in self.repos or not rest:
            return 404, b'{"error": "Repository not found"}', ""
        files = self.repos[name]
        if rest[0] == "preupload":
            modes = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            return 200, json.dumps({"files": modes}).encode(), ""
        if rest[0] == "commit":
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            url = f"{self.address}/{name}/commit/{COMMIT}"
            return 200, json.dumps({"commitOid": COMMIT, "commitUrl": url, "success": True}).encode(), ""
        if rest[0] == "revision":
            siblings = [{"rfilename": file} for file in files]
            return 200, json.dumps({"id": name, "sha": COMMIT, "siblings": siblings}).encode(), ""
        if rest[0] == "tree":
            listed = [
                {"type": "file", "path": file, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for file, content in files.items()
            ]
            return 200, json.dumps(listed).encode(), ""
        if rest[0] == "resolve" and (content := files.get("/".join(rest[2:]))) is not None:
            return 200, content, hashlib.sha1(content).hexdigest()
        return 404, b"{}", ""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    hub = Hub()
    for name, value in {
        "ENDPOINT": hub.address,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.address + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_TOKEN_PATH": str(tmp_path / "token"),
    }.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    for name in ("DRAFTSMITH_OFFLINE", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield hub
    hub.server.shutdown()
    hub.server.server_close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An artifact in the folder of a run, with a log that must not be pushed."""
    target = tiny_target("llama")
    draftsmith.save(built(medusa, HEADS, target), tmp_path / "heads", target=target, record={"seed": 3})
    (tmp_path / "heads" / "log.jsonl").write_text("{}\n")
    return tmp_path / "heads"


def error_of(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    return message


def test_pushed_artifact_loads_by_its_repository_name(
    hub: Hub, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    main(["push", str(folder), "someone/heads", "--private"])
    assert capsys.readouterr().out == f"{hub.address}/someone/heads\n"
    assert hub.is_private == {"someone/heads": True} and "Bearer hf_secret" in hub.tokens
    pushed = hub.repos["someone/heads"]
    assert set(pushed) == {"README.md", "draft_config.json", "model.safetensors"}
    assert all(pushed[name] == (folder / name).read_bytes() for name in ("draft_config.json", "model.safetensors"))
    assert 'draftsmith.load("someone/heads", target)' in pushed["README.md"].decode()
    assert (
        model_card.body(pushed["README.md"].decode()) is not None
        and model_card.PLACEHOLDER in (folder / "README.md").read_text()
    )

    target = tiny_target("llama")
    loaded, saved = draftsmith.load("someone/heads", target), draftsmith.load(folder, target)
    assert read_manifest("someone/heads") == read_manifest(folder)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), saved.parameters(), strict=True))
    main(["inspect", "someone/heads"])
    assert "a drafter of family medusa" in capsys.readouterr().out


def test_push_keeps_a_hand_edited_readme(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    (folder / "README.md").write_text(text := f"---\nlicense: mit\n---\nMy heads, in {model_card.PLACEHOLDER}.")
    main(["push", str(folder), "someone/heads"])
    assert hub.repos["someone/heads"]["README.md"] == text.encode()
    assert hub.is_private == {"someone/heads": False}


def test_push_errors_are_one_line(
    hub: Hub, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "cannot be pushed without a token: run `hf auth login`" in error_of(capsys, "push", folder, "someone/heads")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert "is not a draftsmith artifact" in error_of(capsys, "push", tmp_path, "someone/heads")
    assert "could not be pushed to some one/heads: " in error_of(capsys, "push", folder, "some one/heads")
    monkeypatch.setattr(hub, "answer", lambda path, body: (403, b'{"error": "not yours"}', ""))
    assert "could not be pushed to someone/heads: " in error_of(capsys, "push", folder, "someone/heads")
    monkeypatch.setenv("DRAFTSMITH_OFFLINE", "1")
    sentence = f"draftsmith: {folder} cannot be pushed; DRAFTSMITH_OFFLINE=1 disables access to the hub\n"
    assert error_of(capsys, "push", folder, "someone/heads") == sentence
    assert hub.repos == {}


def test_push_rejects_a_manifest_without_files(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Early manifests have no list of files, and the folder may contain unrelated ones."""
    manifest = json.loads((folder / "draft_config.json").read_text())
    del manifest["files"]
    (folder / "draft_config.json").write_text(json.dumps(manifest))
    assert "does not list the artifact's files" in error_of(capsys, "push", folder, "someone/heads")


def test_load_names_an_artifact_found_neither_locally_nor_on_the_hub(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tiny_target("llama")
    with pytest.raises(
        ValueError, match=r"artifact someone/else: no such folder, and the download from the hub failed: .*"
    ) as error:
        draftsmith.load("someone/else", target)
    assert "\n" not in str(error.value)
    monkeypatch.setenv("DRAFTSMITH_OFFLINE", "1")
    with pytest.raises(
        ValueError, match="someone/else: no such folder; DRAFTSMITH_OFFLINE=1 disables access to the hub"
    ):
        draftsmith.load("someone/else", target)


def test_push_does_not_follow_links_out_of_the_artifact(
    hub: Hub, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    (folder.parent / "secret.txt").write_text("secret")
    for name in ("README.md", "model.safetensors"):
        (folder / name).rename(folder / "aside")
        (folder / name).symlink_to(folder.parent / "secret.txt")
        assert "is a link that leads out of" in error_of(capsys, "push", folder, "someone/heads")
        (folder / name).unlink()
        (folder / "aside").rename(folder / name)
    assert hub.repos == {}


def test_load_writes_no_file_outside_the_cache_that_a_repository_lists(hub: Hub, folder: Path, tmp_path: Path) -> None:
    content = {file.name: file.read_bytes() for file in folder.iterdir()}
    hub.repos["someone/heads"] = content | {"../../../../../escaped.txt": b"bad"}
    with pytest.raises(ValueError, match="the download from the hub failed"):
        draftsmith.load("someone/heads", tiny_target("llama"))
    assert not list(tmp_path.rglob("escaped.txt"))


def test_load_prefers_a_local_folder_to_a_repository(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    target = tiny_target("llama")
    draftsmith.save(lookup.Drafter(lookup.Config(), target), "runs/lookup", target=target)
    draftsmith.load("runs/lookup", target)
    assert hub.tokens == set()
