"""Tokenizers as GGUF files hold them, made of byte-level BPE tokenizers of transformers.

llama.cpp knows pre-tokenizers (how a text is split before BPE) by name. Tokenizers of other kinds are copied from a
GGUF file that llama.cpp's own converter has made.

Shape suffixes: V vocabulary.
"""

import json
from typing import Any

from draftsmith.loading.gguf_contents import Value, array, boolean, text, u32

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
"""GGUF's types of tokens."""
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|NUMBERS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {SPLIT.replace("NUMBERS", r"\p{N}{1,3}"): "llama-bpe", SPLIT.replace("NUMBERS", r"\p{N}"): "qwen2"}
"""Regular expressions of Llama 3 and Qwen 2, and llama.cpp's names for them."""
END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
"""Keys of the tokens that end an answer."""
MIN_MERGES = 1
"""llama.cpp reads no byte-level BPE tokenizer without merges."""


def check_tokenizer(tokenizer: Any, name: str) -> None:
    """Raises ValueError unless the tokenizer can be written."""
    _pre_tokenizer(tokenizer, name)


def tokenizer_values(tokenizer: Any, name: str, vocab_size: int, end_ids: tuple[int, ...]) -> dict[str, Value]:
    """Returns the metadata of the target's tokenizer, filled up to `vocab_size` tokens with unused ones.

    `end_ids` are the tokens with which the target ends an answer. Raises ValueError for a tokenizer of another kind.
    """
    pre = _pre_tokenizer(tokenizer, name)
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens_V, types_V = [f"[PAD{number}]" for number in range(vocab_size)], [UNUSED] * vocab_size
    entries = [(number, token, NORMAL) for token, number in content["model"]["vocab"].items()]
    for added in content["added_tokens"]:
        entries.append((added["id"], added["content"], CONTROL if added["special"] else USER_DEFINED))
    for number, token, kind in entries:
        if number < vocab_size:  # the model has no embedding for others, and never writes them
            tokens_V[number], types_V[number] = token, kind
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]]
    values = {
        "tokenizer.ggml.model": text("gpt2"),
        "tokenizer.ggml.pre": text(pre),
        "tokenizer.ggml.tokens": array(tokens_V, "STRING"),
        "tokenizer.ggml.token_type": array(types_V, "INT32"),
        "tokenizer.ggml.merges": array(merges, "STRING"),
    }
    named = {"bos": tokenizer.bos_token_id, "padding": tokenizer.pad_token_id, "unknown": tokenizer.unk_token_id}
    values |= {f"tokenizer.ggml.{key}_token_id": u32(number) for key, number in named.items() if number is not None}
    ends = end_ids or ((tokenizer.eos_token_id,) if tokenizer.eos_token_id is not None else ())
    values |= {f"tokenizer.ggml.{key}": u32(number) for key, number in zip(END_KEYS, ends, strict=False)}
    around = tokenizer.encode("")
    values["tokenizer.ggml.add_bos_token"] = boolean(tokenizer.bos_token_id in around[:1])
    values["tokenizer.ggml.add_eos_token"] = boolean(len(around) > 0 and tokenizer.eos_token_id in around[-1:])
    if isinstance(template := getattr(tokenizer, "chat_template", None), str):
        values["tokenizer.chat_template"] = text(template)
    return values


def _pre_tokenizer(tokenizer: Any, name: str) -> str:
    """Returns llama.cpp's name of the pre-tokenizer; raises ValueError for a tokenizer of another kind."""
    remedy = "convert the target with llama.cpp's convert_hf_to_gguf.py, and name the file with --target-name FILE.gguf"
    if tokenizer is None:
        raise ValueError(f"{name} has no tokenizer, which every GGUF file holds; save one in its folder")
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise ValueError(f"{name} has a tokenizer without tokenizer.json; {remedy}")
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    model = content["model"]
    if model["type"] != "BPE" or model.get("byte_fallback") or len(model["merges"]) < MIN_MERGES:
        kind = "SentencePiece (byte_fallback)" if model.get("byte_fallback") else f"{model['type']} without merges"
        kind = kind if model["type"] == "BPE" else model["type"]
        raise ValueError(
            f"{name} has a tokenizer of type {kind}, and draftsmith writes byte-level BPE for llama.cpp; {remedy}"
        )
    if (normalizer := (content["normalizer"] or {}).get("type")) not in (None, "NFC"):
        raise ValueError(f"{name}: its tokenizer normalises texts ({normalizer}), which llama.cpp does not; {remedy}")
    found = content["pre_tokenizer"] or {}
    steps = found.get("pretokenizers", [found])
    last = steps[-1]
    by_bytes = last.get("type") == "ByteLevel" and not last.get("add_prefix_space")
    if by_bytes and last.get("use_regex", True):
        if len(steps) == 1:
            return "gpt-2"
        if len(steps) == 2 and steps[0]["type"] == "Digits" and steps[0]["individual_digits"]:
            return "smollm"
    if by_bytes and not last.get("use_regex", True) and len(steps) == 2 and steps[0]["type"] == "Split":
        pre = SPLITS.get(steps[0]["pattern"].get("Regex", ""))
        # llama.cpp takes whole words of the vocabulary before it merges for `llama-bpe`, and for it alone.
        if pre and bool(model.get("ignore_merges")) == (pre == "llama-bpe"):
            return pre
    raise ValueError(
        f"{name}: how its tokenizer splits texts ({json.dumps(found)[:120]}) is not among those draftsmith knows"
        f" llama.cpp's names of (GPT-2, SmolLM, Llama 3, Qwen 2); {remedy}"
    )
