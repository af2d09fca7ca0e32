"""Tiny GGUF files, written with the package gguf as llama.cpp's converter writes them, and wheels that hold one."""

import base64
import hashlib
import zipfile
from pathlib import Path
from typing import Any

import gguf
import torch
from gguf import GGMLQuantizationType as Type

from tests.support.models import CONTEXT, NUM_LAYERS, VOCAB_SIZE, WIDTH, tiny_model

SPECIAL = ("<unk>", "<s>", "</s>", "<turn>")
END_OF_TEXT, END_OF_TURN = 2, 3
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,:;!?-+*=()<>/'"
TOKENS = [*SPECIAL, "Ġ", "ĠĠ", *LETTERS, "Ċ", "_"]
TEMPLATE = "{% for message in messages %}{{ message['content'] }}<turn>{% endfor %}"
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
assert len(TOKENS) <= VOCAB_SIZE
TOKENS += [f"[{number}]" for number in range(len(TOKENS), VOCAB_SIZE)]


def write_gguf(path: Path, *, weights: Type = Type.F32, **metadata: Any) -> Any:
    """Writes a tiny Llama as a GGUF file, its matrices as `weights` and its norms in float32; returns the model.

    `metadata` replaces single values: `architecture`, `pre` (the pre-tokenizer), `template`, `parts`.
    """
    path.parent.mkdir(exist_ok=True)
    model = tiny_model("llama", intermediate_size=64, rms_norm_eps=1e-5)
    config = model.config
    writer = gguf.GGUFWriter(path, metadata.get("architecture", "llama"))
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(NUM_LAYERS)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(VOCAB_SIZE)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(metadata.get("pre", "smollm"))
    writer.add_token_list(TOKENS)
    writer.add_token_types([3 if token in SPECIAL else 1 for token in TOKENS])
    writer.add_token_merges(["Ġ Ġ"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(END_OF_TEXT)
    writer.add_eot_token_id(END_OF_TURN)
    writer.add_add_bos_token(False)
    if template := metadata.get("template", TEMPLATE):
        writer.add_chat_template(template)
    if parts := metadata.get("parts"):
        writer.add_uint16("split.count", parts)
    for name, weight in model.state_dict().items():
        number, _, rest = name.removeprefix("model.layers.").partition(".")
        module = rest if number.isdigit() else name
        new = NAMES[module.removesuffix(".weight")] + ".weight"
        if "q_proj" in name or "k_proj" in name:
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            # llama.cpp rotates neighbouring pairs, transformers the two halves of a head.
            weight = weight.reshape(heads, 2, -1, WIDTH).swapaxes(1, 2).reshape(weight.shape)
        numbers = weight.float().numpy()
        kind = weights if weight.ndim == 2 else Type.F32
        data = numbers if kind == Type.F32 else gguf.quants.quantize(numbers, kind)
        writer.add_tensor(f"blk.{number}.{new}" if number.isdigit() else new, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def quantised(weight: torch.Tensor, kind: Type) -> torch.Tensor:
    """Returns a matrix as a GGUF file of this type holds it, multiplied out."""
    return torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(weight.float().numpy(), kind), kind))


def write_wheel(folder: Path, gguf_file: Path, *, package: str = "tiny_model", version: str = "1.0") -> Path:
    """Writes a wheel that holds a GGUF file and that pip accepts; returns its path."""
    info = f"{package}-{version}.dist-info"
    files = {
        f"{package}/{gguf_file.name}": gguf_file.read_bytes(),
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = ""
    for name, content in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        record += f"{name},sha256={digest},{len(content)}\n"
    folder.mkdir(exist_ok=True)
    wheel = folder / f"{package}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in {**files, f"{info}/RECORD": f"{record}{info}/RECORD,,\n".encode()}.items():
            archive.writestr(name, content)
    return wheel
