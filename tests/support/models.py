"""Tiny models of every architecture that draftsmith is tested with, and prompts for them."""

from functools import cache
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

from draftsmith import Target

VOCAB_SIZE, WIDTH, NUM_LAYERS, CONTEXT, WINDOW = 64, 32, 3, 64, 7
PROMPT_LENGTHS = (9, 3, 1, 14, 6)

_LLAMA = {
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": CONTEXT,
    "tie_word_embeddings": False,
}
_MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
_CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "mistral": _LLAMA | {"sliding_window": WINDOW},
    "qwen2": {key: value for key, value in _LLAMA.items() if key != "head_dim"},
    "qwen3": _LLAMA,
    "gemma2": _LLAMA | {"sliding_window": WINDOW, "layer_types": _MIXED, "query_pre_attn_scalar": 8},
    "gemma3_text": _LLAMA | {"sliding_window": WINDOW, "layer_types": _MIXED, "query_pre_attn_scalar": 8},
    "phi3": {key: value for key, value in _LLAMA.items() if key != "head_dim"} | {"sliding_window": WINDOW},
    "gpt2": {"n_embd": WIDTH, "n_layer": NUM_LAYERS, "n_head": 4, "n_positions": CONTEXT, "tie_word_embeddings": False},
    "gpt_neox": {key: value for key, value in _LLAMA.items() if key not in ("head_dim", "num_key_value_heads")},
    "opt": {
        "hidden_size": WIDTH,
        "word_embed_proj_dim": WIDTH,
        "ffn_dim": 48,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": 4,
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": False,
    },
    "t5": {
        "d_model": WIDTH,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": NUM_LAYERS,
        "num_heads": 4,
        "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 20,
    },
    "bart": {
        "d_model": WIDTH,
        "encoder_layers": 2,
        "decoder_layers": NUM_LAYERS,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": False,
    },
}
SEQ2SEQ = ("t5", "bart")
CAUSAL = tuple(name for name in _CONFIGS if name not in SEQ2SEQ)
# Chosen so that each of five greedy texts has at least five different tokens; other architectures have with seed 0.
_SEEDS = {"llama": 14, "mistral": 6, "qwen3": 13, "gpt2": 12, "gpt_neox": 11, "opt": 1, "t5": 15, "bart": 13}


def tiny_config(architecture: str, **changes: Any) -> Any:
    """Returns the configuration of a tiny model, updated with `changes`."""
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "vocab_size": VOCAB_SIZE}
    if architecture in SEQ2SEQ:
        tokens["decoder_start_token_id"] = 0
    settings = tokens | _CONFIGS.get(architecture, {}) | changes
    return AutoConfig.for_model(architecture, **settings)


def tiny_model(architecture: str, *, seed: int | None = None, sharpness: float = 2.0, **changes: Any) -> Any:
    """Returns a float32 model whose greedy text varies; its logits have a standard deviation of about `sharpness`.

    Its generation config has no end-of-sequence, so that texts have the requested length.
    """
    config = tiny_config(architecture, **changes)
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = auto.from_config(config, dtype=torch.float32).eval()
    scramble(model, seed=_SEEDS.get(architecture, 0) if seed is None else seed, sharpness=sharpness)
    start = 0 if config.is_encoder_decoder else None
    model.generation_config = GenerationConfig(pad_token_id=0, decoder_start_token_id=start)
    return model


@torch.no_grad()
def scramble(model: torch.nn.Module, *, seed: int, sharpness: float = 2.0) -> None:
    """Sets every weight at random, biases and norms included: defaults of one and zero would hide errors."""
    generator = torch.Generator().manual_seed(seed)
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    head = getattr(model, "get_output_embeddings", lambda: None)()
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator).to(parameter.device)
        if parameter.ndim < 2:
            parameter += 0.2 * noise
        else:
            parameter.copy_(1.5 * noise / parameter.shape[-1] ** 0.5)
        if "EncDecAttention.o." in name or "encoder_attn.out_proj" in name:
            parameter *= 0.1  # cross-attention is the same at every step
    if embedding is not None:
        # Large embeddings would dominate the blocks' output, and with it attention's.
        embedding.weight *= 0.3
    if head is not None and head.weight is not embedding.weight:
        head.weight *= sharpness / 1.5


@cache
def tiny_target(architecture: str, attention: str | None = None, dtype: torch.dtype = torch.float32) -> Target:
    """Returns the target of the architecture's tiny model, the same object for all tests."""
    return Target(tiny_model(architecture, attn_implementation=attention).to(dtype))


def tiny_tokenizer(vocab_size: int = VOCAB_SIZE, *, prefix: str = "w") -> PreTrainedTokenizerFast:
    """Returns a tokenizer of `vocab_size` words such as w7, one token each."""
    words = {f"{prefix}{number}": number for number in range(vocab_size)}
    tokenizer = Tokenizer(WordLevel(words, unk_token=f"{prefix}0"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=f"{prefix}0")


def prompts(num_rows: int, *, seed: int = 0, vocab_size: int = VOCAB_SIZE) -> list[list[int]]:
    """Returns prompts of unequal lengths, one of a single token among the first three; each repeats a phrase."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for row in range(num_rows):
        phrase = torch.randint(3, vocab_size, (4,), generator=generator).tolist()
        rows.append((phrase * 4)[: PROMPT_LENGTHS[row % len(PROMPT_LENGTHS)]])
    return rows


def padded(rows: list[list[int]], *, side: str = "right") -> tuple[Tensor, Tensor]:
    """Returns (input_ids, attention_mask) [B, T]; padding is an ordinary token."""
    longest = max(map(len, rows))
    ids, mask = torch.full((len(rows), longest), 5), torch.zeros(len(rows), longest, dtype=torch.long)
    for index, row in enumerate(rows):
        kept = slice(0, len(row)) if side == "right" else slice(longest - len(row), longest)
        ids[index, kept], mask[index, kept] = torch.tensor(row), 1
    return ids, mask


@cache
def greedy_by_transformers(
    architecture: str, num_rows: int, num_new: int, dtype: torch.dtype = torch.float32
) -> list[list[int]]:
    """Returns transformers' greedy output for `prompts(num_rows)`, prompts included, generated row by row."""
    return greedy_by_model(tiny_target(architecture, dtype=dtype).model, num_rows, num_new)


def greedy_by_model(model: Any, num_rows: int, num_new: int) -> list[list[int]]:
    """Returns the same for any model."""
    texts = []
    for row in prompts(num_rows):
        given = {"inputs": torch.tensor([row]), "attention_mask": torch.ones(1, len(row))}
        out = model.generate(**given, do_sample=False, max_new_tokens=num_new)
        texts.append(out[0].tolist())
    return texts
