"""GGUF files, the models of llama.cpp: checked before their weights are read, and converted to transformers folders.

A conversion has two steps, because configuration and tokenizer are needed long before the weights: `convert_info` and
`convert_weights`. Quantised weights are multiplied out to bfloat16; the others keep the file's floating-point type.
"""

import importlib.util
import io
import json
import mmap
import re
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, GenerationConfig
from transformers import PreTrainedTokenizerFast as FastTokenizer
from transformers.utils import logging

from draftsmith.loading import remote_code
from draftsmith.loading.weights import load_model

WEIGHTS = "model.safetensors"
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Formats of `struct` for GGUF's types of single numbers."""
STRING, ARRAY = 8, 9
FLOATS = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}
"""Types of tensors that are stored as plain numbers."""
PART = re.compile(r"-(\d{5})-of-(\d{5})$")
"""How llama.cpp names the files of a model that is split."""
BLOCK = re.compile(r"(?:^|\.)blk\.(\d+)\.")
"""The number of the block that a tensor's name belongs to."""
SINGLE_DIGITS = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}
"""Values of `tokenizer.ggml.pre` for which llama.cpp splits numbers into digits before it splits as GPT-2 does.

transformers takes GPT-2's splitting alone for them, which joins a space and the digit after it.
"""
END_TOKENS = ("eos_token_id", "eot_token_id", "eom_token_id")
"""Tokens with which llama.cpp ends an answer: of a text, of a turn and of a message."""


@dataclass(frozen=True, kw_only=True)
class GgufHeader:
    """What a GGUF file says about its model, without the weights."""

    metadata: dict[str, Any]
    """Single numbers and strings; of an array, its length."""
    tensor_types: dict[str, int]
    """ggml's type of each tensor."""

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture", ""))

    @property
    def dtype(self) -> torch.dtype:
        """The floating-point type of the weights, bfloat16 if any are quantised."""
        types = set(self.tensor_types.values())
        if types <= FLOATS.keys():
            # Norms stay in float32 beside weights of 16 bits.
            return next(FLOATS[kind] for kind in (30, 1, 0) if kind in types)
        return torch.bfloat16


def find_gguf(path: str) -> Path | None:
    """Returns the GGUF file that `path` names: itself, or the only one of a folder without config.json.

    Returns None for anything else, and raises ValueError for a folder with several.
    """
    given = Path(path)
    if given.suffix.lower() == ".gguf" and given.is_file():
        return given
    if not given.is_dir() or (given / "config.json").is_file():
        return None
    found = sorted(file for file in given.iterdir() if file.suffix.lower() == ".gguf")
    if len(found) > 1 and not all(PART.search(file.stem) for file in found):
        names = ", ".join(file.name for file in found)
        raise ValueError(f"target folder {path} has {len(found)} GGUF files ({names}); name one of them")
    return found[0] if found else None


def read_header(path: Path) -> GgufHeader:
    """Reads and checks the part of a GGUF file before its weights.

    Raises ValueError if it is no GGUF file, is cut off, is one of several files of a model, or has no weights.
    """
    if part := PART.search(path.stem):
        raise ValueError(_split(path, int(part[2])))
    size = path.stat().st_size
    if size == 0:
        raise ValueError(f"{path} is empty; download it again")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        if content[:4] != b"GGUF":
            raise ValueError(f"{path} is not a GGUF file: it does not start with 'GGUF'; download it again")
        try:
            header, end = _parse(content, path)
        except (struct.error, IndexError, UnicodeDecodeError, OverflowError, RecursionError, MemoryError):
            raise ValueError(
                f"{path} is cut off or damaged within its first {size:,} bytes; download it again"
            ) from None
    if (parts := _count(path, header.metadata, "split.count", 1)) > 1:
        raise ValueError(_split(path, parts))
    if not isinstance(header.metadata.get("general.architecture", ""), str):
        raise ValueError(f"{path} is damaged: general.architecture is no text; download it again")
    if not header.tensor_types:
        raise ValueError(f"{path} has no weights, only a vocabulary; name the GGUF file of the model")
    key = f"{header.architecture}.block_count"
    blocks = {int(found[1]) for name in header.tensor_types if (found := BLOCK.search(name))}
    if blocks and _count(path, header.metadata, key, len(blocks)) > max(blocks) + 1:
        raise ValueError(
            f"{path} is damaged: its {key} is {header.metadata[key]}, and it has weights of {max(blocks) + 1} blocks;"
            " download it again"
        )
    if end > size:
        raise ValueError(f"{path} is cut off: it has {size:,} bytes of {end:,}; download it again")
    return header


def convert_info(path: Path, folder: Path) -> None:
    """Writes a GGUF file's configuration, generation configuration and tokenizer to `folder`, as transformers has them.

    Raises ValueError, naming the architecture, if transformers cannot read the file.
    """
    header = read_header(path)
    check_installed(path)
    file: dict[str, Any] = {"gguf_file": path.name}
    config, fault = None, ""
    try:
        with _quiet():
            config = AutoConfig.from_pretrained(path.parent, trust_remote_code=False, **file)
    except Exception as error:  # of any kind, for metadata that is missing or wrong
        fault = remote_code.reason(error)
    if config is None:  # raised here, as the caught error would keep transformers' map of the file open
        raise ValueError(
            f"{path}: transformers cannot read GGUF files of architecture {header.architecture!r} ({fault}); name a"
            " transformers folder of this model"
        )
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    if type(config) not in auto._model_mapping:
        raise ValueError(f"{path} holds a model of architecture {header.architecture!r}, which generates no text")
    config.architectures = [auto._model_mapping[type(config)].__name__]
    config.dtype = header.dtype
    ends = [header.metadata[key] for name in END_TOKENS if (key := f"tokenizer.ggml.{name}") in header.metadata]
    generation = GenerationConfig.from_model_config(config)
    if ends:
        generation.eos_token_id = ends[0] if len(ends) == 1 else list(dict.fromkeys(ends))
    config.save_pretrained(folder)
    generation.save_pretrained(folder)
    if "tokenizer.ggml.model" in header.metadata:
        _convert_tokenizer(path, folder, header)


def convert_weights(path: Path, info: Path, folder: Path) -> None:
    """Writes a GGUF file's weights to `folder`, as one safetensors file that fits the configuration in `info`.

    Raises ValueError if transformers cannot read them, or if they are missing or not finite.
    """
    header = read_header(path)
    check_installed(path)
    config = AutoConfig.from_pretrained(info)  # given, so that the file is not read once more for it
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    options = {"gguf_file": path.name, "dtype": header.dtype, "trust_remote_code": False}
    model, fault = None, ""
    try:
        with _quiet():
            model = load_model(auto, str(path.parent), config=config, **options)
    except NotImplementedError as error:
        fault = f"has weights of a type that cannot be de-quantised: {error}"
    except (RuntimeError, MemoryError, TypeError, LookupError, ArithmeticError) as error:  # for damaged metadata
        fault = f"cannot be converted ({remote_code.reason(error)}); download it again"
    if model is None:
        raise ValueError(f"{path} {fault}")
    _forget_quantisation(model)
    with _quiet():
        # One file, so that moving it makes the folder complete.
        model.save_pretrained(folder, max_shard_size=2**60)


def check_installed(path: Path) -> None:
    """Raises ValueError if the package that reads GGUF files is missing."""
    if importlib.util.find_spec("gguf") is None:
        raise ValueError(
            f"{path} is a GGUF file, and the package gguf, which reads it, is not installed; run"
            " pip install 'draftsmith[gguf]' (in a checkout ./launch.sh setup)"
        )


def _forget_quantisation(model: Any) -> None:
    """Makes a de-quantised model the plain one that it is: transformers marks it as quantised and does not save it."""
    for config in {id(one): one for one in (model.config, model.config.get_text_config(decoder=True))}.values():
        if hasattr(config, "quantization_config"):
            del config.quantization_config
    for name in ("hf_quantizer", "quantization_method"):
        if hasattr(model, name):
            delattr(model, name)
    model.is_quantized = False
    model._weight_conversions = None  # those of the loading; saving would apply them the other way round


def _convert_tokenizer(path: Path, folder: Path, header: GgufHeader) -> None:
    tokenizer, fault = None, ""
    try:
        with _quiet():
            # Not AutoTokenizer, which reads the whole file again to learn the architecture.
            tokenizer = FastTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except Exception as error:  # the tokenizers library raises Exception itself
        fault = remote_code.reason(error)
    if tokenizer is None:
        kind = header.metadata["tokenizer.ggml.model"]
        raise ValueError(
            f"{path}: its tokenizer, of type {kind!r}, cannot be read ({fault}); name a transformers folder of this"
            " model"
        )
    tokenizer.save_pretrained(folder)
    if header.metadata.get("tokenizer.ggml.pre") in SINGLE_DIGITS:
        file = folder / "tokenizer.json"
        content = json.loads(file.read_text())
        digits = {"type": "Digits", "individual_digits": True}
        content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, content["pre_tokenizer"]]}
        file.write_text(json.dumps(content, ensure_ascii=False, indent=2))


def _split(path: Path, parts: int) -> str:
    return (
        f"{path} is one of the {parts} files of its model; merge them into one with llama.cpp's"
        " `llama-gguf-split --merge FIRST.gguf WHOLE.gguf`, and name that"
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps transformers from warning about kernels for quantised weights, and from showing progress in a log file."""
    level, shows_progress = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    # The progress of de-quantising obeys no setting of transformers; large files take minutes, so a terminal shows it.
    shown = sys.stderr if sys.stderr.isatty() else io.StringIO()
    try:
        with redirect_stderr(shown):
            yield
    finally:
        logging.set_verbosity(level)
        if shows_progress:
            logging.enable_progress_bar()


def _parse(content: Any, path: Path) -> tuple[GgufHeader, int]:
    """Returns the header of a mapped file, and the number of bytes that the file must have."""
    version, num_tensors, num_values = struct.unpack_from("<IQQ", content, 4)
    if version not in (2, 3):
        order = "its numbers are big-endian" if version in (2 << 24, 3 << 24) else f"its GGUF version is {version}"
        raise ValueError(f"{path}: {order}, and only versions 2 and 3, little-endian, can be read; convert it again")
    position, metadata = 24, {}
    for _ in range(num_values):
        key, position = _string(content, position)
        (kind,) = struct.unpack_from("<I", content, position)
        metadata[key], position = _value(content, position + 4, kind)
    types, end = {}, 0
    for _ in range(num_tensors):
        name, position = _string(content, position)
        (num_axes,) = struct.unpack_from("<I", content, position)
        shape = struct.unpack_from(f"<{num_axes}Q", content, position + 4)
        kind, offset = struct.unpack_from("<IQ", content, position + 4 + 8 * num_axes)
        position += 16 + 8 * num_axes
        types[name] = kind
        end = max(end, offset + _num_bytes(kind, prod(shape)))
    alignment = _count(path, metadata, "general.alignment", 32)
    start = -(-position // alignment) * alignment
    return GgufHeader(metadata=metadata, tensor_types=types), start + end if types else position


def _count(path: Path, metadata: dict[str, Any], key: str, default: int) -> int:
    """Returns a whole number of at least 1 from the metadata; raises ValueError if it is anything else."""
    value = metadata.get(key, default)
    if type(value) is not int or value < 1:
        raise ValueError(f"{path} is damaged: {key} is {value!r:.40}, expected a whole number; download it again")
    return value


def _string(content: Any, position: int) -> tuple[str, int]:
    (length,) = struct.unpack_from("<Q", content, position)
    begin, end = position + 8, position + 8 + length
    if end > len(content):
        raise IndexError("the string ends after the file")
    return content[begin:end].decode(), end


def _value(content: Any, position: int, kind: int) -> tuple[Any, int]:
    """Returns a value, or an array's length, and the position after it."""
    if kind == STRING:
        return _string(content, position)
    if kind != ARRAY:
        if kind not in NUMBERS:
            raise IndexError(f"unknown type {kind}")
        (value,) = struct.unpack_from(f"<{NUMBERS[kind]}", content, position)
        return value, position + struct.calcsize(f"<{NUMBERS[kind]}")
    kind, length = struct.unpack_from("<IQ", content, position)
    position += 12
    if kind in NUMBERS:
        return length, position + length * struct.calcsize(f"<{NUMBERS[kind]}")
    for _ in range(length):  # of strings or arrays
        if kind == STRING:
            position += 8 + struct.unpack_from("<Q", content, position)[0]
        else:
            _, position = _value(content, position, kind)
    return length, position


def _num_bytes(kind: int, num_values: int) -> int:
    """Returns the size of a tensor; 0 if its type is unknown or the package gguf is missing."""
    if kind in FLOATS:
        return num_values * FLOATS[kind].itemsize
    try:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    except ImportError:
        return 0
    try:
        block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    except (ValueError, KeyError):
        return 0
    return num_values // block * block_bytes
