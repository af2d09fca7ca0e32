"""GGUF files as targets: the converted model is the file's, and unsuitable files are rejected before weights load."""

import resource
import struct
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType as Type
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import draftsmith
from data.prompts import load_prompts
from draftsmith import Target
from draftsmith.artifacts.provenance import template_hash
from draftsmith.loading.cache_folder import HOME
from draftsmith.loading.gguf_files import read_header
from draftsmith.loading.model_info import read_target_info
from tests.support.gguf import END_OF_TEXT, END_OF_TURN, quantised, write_gguf
from tests.support.models import CONTEXT, VOCAB_SIZE, WIDTH, prompts


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache folder of a test."""
    monkeypatch.setenv(HOME, str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.mark.parametrize("kind", [Type.F32, Type.F16, Type.Q8_0, Type.Q4_1])
def test_a_converted_gguf_is_the_model_of_the_file(kind: Type, tmp_path: Path) -> None:
    model = write_gguf(tmp_path / "model.gguf", weights=kind)
    target = Target.from_pretrained(tmp_path / "model.gguf")
    expected = {Type.F32: torch.float32, Type.F16: torch.float16}.get(kind, torch.bfloat16)
    assert target.dtype == expected
    found = target.model.state_dict()
    for name, weight in model.state_dict().items():
        stored = quantised(weight, kind) if weight.ndim == 2 else weight
        assert torch.equal(found[name], stored.to(expected)), name
    assert getattr(target.model.config, "quantization_config", None) is None
    if kind == Type.F32:
        wanted = model.generate(torch.tensor(prompts(1)), do_sample=False, max_new_tokens=12)
        got = draftsmith.generate(target, prompts(1), max_new_tokens=12, eos_token_id=[]).sequences
        assert got.tolist() == wanted.tolist()


def test_a_gguf_target_saves_loads_and_names_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_gguf(tmp_path / "given" / "model.gguf", weights=Type.Q8_0)
    from_file = Target.from_pretrained(tmp_path / "given" / "model.gguf")
    from_folder = Target.from_pretrained(tmp_path / "given", dtype="float32")
    assert "converting" in capsys.readouterr().err and from_folder.dtype == torch.float32
    assert from_file.fingerprint == from_folder.fingerprint
    assert from_file.name == str(tmp_path / "given" / "model.gguf") and from_folder.name == str(tmp_path / "given")
    from_file.model.save_pretrained(tmp_path / "saved")
    assert Target.from_pretrained(tmp_path / "saved").fingerprint == from_file.fingerprint
    assert "converting" not in capsys.readouterr().err, "it is converted once"
    write_gguf(tmp_path / "given" / "model.gguf", weights=Type.Q4_1)
    assert Target.from_pretrained(tmp_path / "given").fingerprint != from_file.fingerprint, "the file has changed"


def test_target_info_of_a_gguf_needs_no_weights(tmp_path: Path, home: Path) -> None:
    write_gguf(tmp_path / "model.gguf", weights=Type.Q8_0)
    info = read_target_info(str(tmp_path / "model.gguf"))
    assert not list(home.rglob("*.safetensors"))
    assert info.name == str(tmp_path / "model.gguf")
    assert (info.vocab_size, info.hidden_size, info.context_length) == (VOCAB_SIZE, WIDTH, CONTEXT)
    assert info.eos_token_ids == (END_OF_TEXT, END_OF_TURN) and not info.is_quantised
    target = Target.from_pretrained(tmp_path / "model.gguf")
    assert info.tokenizer_hash == target.tokenizer_hash and info.eos_token_ids == target.eos_token_ids
    (folder,) = (path.parent for path in home.rglob("*.safetensors"))
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.bfloat16, "transformers needs nothing else"
    assert GenerationConfig.from_pretrained(folder).eos_token_id == [END_OF_TEXT, END_OF_TURN]
    assert template_hash(AutoTokenizer.from_pretrained(folder)) == template_hash(info.tokenizer) is not None


@pytest.mark.parametrize(
    ("pre", "tokens"),
    [("smollm", ["a", "ĠĠ", "1", "2"]), ("gpt-2", ["a", "Ġ", "Ġ", "1", "2"])],
)
def test_tokenizer_of_a_gguf_splits_numbers_as_its_pre_tokenizer_does(
    pre: str, tokens: list[str], tmp_path: Path
) -> None:
    """llama.cpp takes digits one by one for smollm, so that two spaces before them are one token."""
    write_gguf(tmp_path / "model.gguf", pre=pre)
    tokenizer = read_target_info(str(tmp_path / "model.gguf")).tokenizer
    assert tokenizer.tokenize("a  12") == tokens
    assert tokenizer.tokenize("a<turn>b") == ["a", "<turn>", "b"]


def test_conversations_need_the_chat_template_that_a_gguf_lacks(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", template="")
    (tmp_path / "chats.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}]}\n')
    tokenizer = read_target_info(str(tmp_path / "model.gguf")).tokenizer
    with pytest.raises(ValueError, match="a conversation, but the tokenizer has no chat template"):
        load_prompts(str(tmp_path / "chats.jsonl"), tokenizer, max_prompts=1)


def cut(path: Path, num_bytes: int) -> None:
    path.write_bytes(path.read_bytes()[:num_bytes])


def write_header(path: Path, key: str, kind: int, value: bytes) -> None:
    """Writes a GGUF file of one tensor with one entry of metadata, of ggml's type `kind`."""
    entry = struct.pack("<Q", len(key)) + key.encode() + struct.pack("<I", kind) + value
    tensor = struct.pack("<Q", 1) + b"w" + struct.pack("<IQIQ", 1, 4, 0, 0)
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1, 1) + entry + tensor + bytes(64))


def changed(path: Path, position: int, value: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[position : position + len(value)] = value
    path.write_bytes(content)


def set_number(path: Path, key: str, value: int) -> None:
    """Changes a whole number of 32 bits in a GGUF file's metadata."""
    changed(path, path.read_bytes().index(key.encode()) + len(key) + 4, struct.pack("<I", value))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda path: cut(path, path.stat().st_size - 999),
            r"cut off: it has [\d,]+ bytes of [\d,]+; download it again",
        ),
        (lambda path: cut(path, 700), "cut off or damaged within its first 700 bytes"),
        (lambda path: cut(path, 0), "is empty; download it again"),
        (lambda path: changed(path, 0, b"GGML"), "is not a GGUF file: it does not start with 'GGUF'"),
        (lambda path: changed(path, 4, struct.pack("<I", 9)), "its GGUF version is 9, and only versions 2 and 3"),
        (lambda path: changed(path, 4, struct.pack(">I", 3)), "its numbers are big-endian"),
        (lambda path: path.rename(path.with_name("model-00001-of-00002.gguf")), "is one of the 2 files of its model"),
        (lambda path: write_gguf(path, parts=3), "one of the 3 files of its model; merge them .*llama-gguf-split"),
        (lambda path: path.with_name("other.gguf").touch(), r"has 2 GGUF files \(model.gguf, other.gguf\); name one"),
        (lambda path: write_header(path, "general.alignment", 4, bytes(4)), "general.alignment is 0, expected a whole"),
        (
            lambda path: write_header(path, "split.count", 8, struct.pack("<Q", 0)),
            "split.count is '', expected a whole",
        ),
        (lambda path: write_header(path, "a", 9, struct.pack("<IQ", 9, 1) * 5000), "cut off or damaged"),
        (lambda path: write_header(path, "a", 9, struct.pack("<IQ", 4, 2**62)), "cut off or damaged"),
        (lambda path: set_number(path, "llama.block_count", 0), "block_count is 0, expected a whole number"),
        (lambda path: set_number(path, "llama.block_count", 2**31), "block_count is 2147483648, and it has weights of"),
        (lambda path: write_gguf(path, architecture="nosuch"), "cannot read GGUF files of architecture 'nosuch'"),
    ],
)
def test_unsuitable_gguf_files_are_named_in_one_sentence(damage: Any, message: str, tmp_path: Path) -> None:
    write_gguf(tmp_path / "given" / "model.gguf")
    damage(tmp_path / "given" / "model.gguf")
    for read in (read_target_info, Target.from_pretrained):
        with pytest.raises(ValueError, match=message) as error:
            read(str(tmp_path / "given"))
        assert "\n" not in str(error.value)


def test_a_file_whose_model_does_not_fit_into_memory_is_named(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf")
    set_number(tmp_path / "model.gguf", "llama.feed_forward_length", 2**31 - 1)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (2**36, limits[1]))
    try:
        with pytest.raises(ValueError, match=r"model.gguf cannot be converted \(.*allocate memory") as error:
            Target.from_pretrained(tmp_path / "model.gguf")
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert "\n" not in str(error.value)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="lists the maps of a process as Linux does")
@pytest.mark.parametrize("fault", ["type", "architecture"])
def test_a_file_that_transformers_cannot_read_is_closed_while_the_error_lives(fault: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, **({"architecture": "nosuch"} if fault == "architecture" else {}))
    if fault == "type":
        name = b"token_embd.weight"
        after_shape = path.read_bytes().index(name) + len(name) + 4 + 2 * 8
        changed(path, after_shape, struct.pack("<I", Type.I32))
    with pytest.raises(ValueError, match="weights of a type that cannot be de-quantised|cannot read GGUF") as error:
        Target.from_pretrained(path)
    assert error.value.__context__ is None
    assert str(path) not in Path("/proc/self/maps").read_text()


def test_a_missing_package_is_named_before_anything_is_converted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_gguf(tmp_path / "model.gguf", weights=Type.Q8_0)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(
        ValueError, match=r"package gguf, which reads it, is not installed; run pip install 'draftsmith"
    ):
        read_target_info(str(tmp_path / "model.gguf"))
    assert read_header(tmp_path / "model.gguf").architecture == "llama", "the header needs no package"
