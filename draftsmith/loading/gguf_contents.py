"""The contents of GGUF files: values with their types, and tensors; read whole, and written tensor by tensor.

Shape suffixes: H width of a head, X any axes, as torch has them (a GGUF file lists them in reverse).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from draftsmith.loading.gguf_files import check_installed, read_header

KINDS = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "mxfp4", "tq1_0", "tq2_0")
"""Types of tensors that the package gguf writes; it reads the others of llama.cpp (q4_k, iq4_xs, ...) only."""
DTYPE_KINDS = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
UNSUITABLE_ROWS = "f16"
"""Type of the matrices whose rows do not divide into blocks of the type wanted, as in llama.cpp's own quantiser."""


@dataclass(frozen=True)
class Value:
    """One entry of a GGUF file's metadata."""

    value: Any
    kind: str
    """GGUF's name of its type, such as UINT32, or ARRAY."""
    inner: str = ""
    """Type of an array's elements."""


def u32(value: int) -> Value:
    return Value(int(value), "UINT32")


def f32(value: float) -> Value:
    return Value(float(value), "FLOAT32")


def boolean(value: bool) -> Value:
    return Value(bool(value), "BOOL")


def text(value: str) -> Value:
    return Value(value, "STRING")


def array(values: list[Any], inner: str) -> Value:
    return Value(values, "ARRAY", inner)


def read_values(path: Path, prefix: str = "") -> dict[str, Value]:
    """Returns the metadata under keys that start with `prefix`, arrays whole; raises ValueError for a damaged file."""
    found = {}
    for key, field in _reader(path).fields.items():
        if key.startswith(prefix) and not key.startswith("GGUF."):
            inner = field.types[-1].name if field.types[0].name == "ARRAY" and len(field.types) > 1 else ""
            found[key] = Value(field.contents(), field.types[0].name, inner)
    return found


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Returns all tensors, quantised ones multiplied out to float32; raises ValueError for a type it cannot read."""
    import gguf

    tensors = {}
    for one in _reader(path).tensors:
        shape_X = tuple(int(size) for size in reversed(one.shape))
        kind = one.tensor_type.name
        if kind in ("F32", "F16", "I8", "I16", "I32", "I64", "F64"):
            numbers = np.array(one.data)
        else:
            try:
                numbers = gguf.quants.dequantize(one.data, one.tensor_type)
            except NotImplementedError:
                raise ValueError(
                    f"{path}: tensor {one.name!r} is of type {kind}, which the package gguf cannot multiply out; name a"
                    " file of another quantisation"
                ) from None
        tensors[one.name] = torch.from_numpy(numbers.reshape(shape_X))
    return tensors


def check_tokens(values: dict[str, Value], path: Path, target: Any) -> None:
    """Raises ValueError if the tokens of a GGUF file are not those of the target's tokenizer, as far as both know."""
    tokens = values.get("tokenizer.ggml.tokens", Value([], "ARRAY")).value
    if len(tokens) != target.vocab_size:
        raise ValueError(
            f"{path} has {len(tokens)} tokens, and target {target.name} has {target.vocab_size}; it is of another"
            " tokenizer"
        )
    for token, number in target.tokenizer.get_vocab().items() if target.tokenizer is not None else ():
        if number < len(tokens) and tokens[number] != token:
            raise ValueError(
                f"{path} is of another tokenizer: its token {number} is {tokens[number]!r}, and that of target"
                f" {target.name} is {token!r}"
            )


def check_kind(kind: str, option: str) -> None:
    """Raises ValueError unless `kind` is a type that can be written."""
    if kind not in KINDS:
        known = ", ".join(KINDS)
        raise ValueError(
            f"{option} is {kind!r}; the package gguf writes {known}. For others run llama.cpp's llama-quantize on an"
            " export in f16"
        )


def write_gguf(
    path: Path, architecture: str, values: Mapping[str, Value], tensors: Mapping[str, Tensor], kind: str
) -> None:
    """Writes a GGUF file with its matrices as `kind`, other floating-point tensors in float32 and integers in int64.

    Matrices whose rows are no multiple of the type's block are written as `UNSUITABLE_ROWS`. Tensors are converted one
    at a time. Raises ValueError if the package gguf is missing, or if a weight is not finite in its type.
    """
    check_installed(path)
    import gguf

    types = {name: _type(tensor, kind) for name, tensor in tensors.items()}
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in values.items():
        inner = gguf.GGUFValueType[value.inner] if value.inner else None
        writer.add_key_value(key, value.value, gguf.GGUFValueType[value.kind], inner)
    for name, tensor in tensors.items():
        block, block_bytes = gguf.GGML_QUANT_SIZES[types[name]]
        writer.add_tensor_info(
            name, tuple(tensor.shape), np.dtype(np.float32), tensor.numel() // block * block_bytes, types[name]
        )
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, tensor in tensors.items():
            writer.write_tensor_data(_converted(name, tensor.detach().cpu(), types[name]))
    finally:
        writer.close()
    read_header(path)  # the file is whole


def interleave(weight_X: Tensor, num_heads: int) -> Tensor:
    """Returns a projection's rows, or its bias, so that rows 2j and 2j + 1 of a head are its old j and H / 2 + j."""
    halves = weight_X.reshape(num_heads, 2, -1, *weight_X.shape[1:])
    return halves.transpose(1, 2).reshape(weight_X.shape)


def deinterleave(weight_X: Tensor, num_heads: int) -> Tensor:
    """Returns what `interleave` was given."""
    pairs = weight_X.reshape(num_heads, -1, 2, *weight_X.shape[1:])
    return pairs.transpose(1, 2).reshape(weight_X.shape)


def _type(tensor: Tensor, kind: str) -> Any:
    import gguf

    types = gguf.GGMLQuantizationType
    if not tensor.is_floating_point():
        return types.I64
    if tensor.ndim < 2:
        return types.F32
    block, _ = gguf.GGML_QUANT_SIZES[types[kind.upper()]]
    return types[kind.upper()] if tensor.shape[-1] % block == 0 else types[UNSUITABLE_ROWS.upper()]


def _converted(name: str, tensor: Tensor, kind: Any) -> np.ndarray:
    import gguf

    if kind.name == "I64":
        return tensor.long().contiguous().numpy()
    numbers = tensor.float().contiguous().numpy()
    if not np.isfinite(numbers).all() or (kind.name == "F16" and np.abs(numbers).max(initial=0) > np.finfo("f2").max):
        raise ValueError(
            f"tensor {name!r} holds numbers that are not finite in {kind.name}; check the weights, or write them as f32"
        )
    return numbers if kind.name == "F32" else gguf.quants.quantize(numbers, kind)


def _reader(path: Path) -> Any:
    read_header(path)  # raises ValueError for what the reader would fail on
    check_installed(path)
    import gguf

    try:
        return gguf.GGUFReader(path)
    except Exception as error:  # it raises many kinds for a damaged file
        raise ValueError(f"{path} cannot be read ({type(error).__name__}: {error}); download it again") from None
