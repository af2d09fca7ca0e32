"""A tokenizer trained on Python's own source, tiny targets that use it, and killing recipes."""

import argparse
import inspect
import json
import os
import random
import signal
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from data.prompts import Prompt, load_prompts
from draftsmith import Target
from tests.support.models import tiny_model
from tests.support.warm import ForkedRun

VOCAB_SIZE, CONTEXT, EOS_ID = 384, 256, 2
TEXT = inspect.getsource(argparse) + inspect.getsource(json)
# ChatML without and with the markers of what the assistant wrote.
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MARKED_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<eos>{% endgeneration %}\n{% else %}{{ m.content }}<eos>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@lru_cache
def _trained(vocab_size: int) -> Tokenizer:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<pad>", "<bos>", "<eos>"]
    options = {"special_tokens": special, "initial_alphabet": alphabet, "show_progress": False}
    bpe.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=vocab_size, **options))
    return bpe


def trained_tokenizer(chat_template: str | None = None, *, vocab_size: int = VOCAB_SIZE) -> PreTrainedTokenizerFast:
    """Returns a byte-level BPE of Python source."""
    return PreTrainedTokenizerFast(
        tokenizer_object=_trained(vocab_size),
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        chat_template=chat_template,
    )


def text_target(architecture: str = "llama", *, seed: int = 0) -> Target:
    """Returns a tiny model in float32 with the trained tokenizer."""
    limit = {} if architecture == "t5" else {"max_position_embeddings": CONTEXT}
    return Target(tiny_model(architecture, seed=seed, vocab_size=VOCAB_SIZE, **limit), trained_tokenizer())


def save_target(folder: Path, architecture: str = "llama") -> str:
    """Writes `text_target()` as a transformers folder and returns its path."""
    target = text_target(architecture)
    target.model.save_pretrained(folder)
    target.tokenizer.save_pretrained(folder)
    return str(folder)


def write_prompts(path: Path, num_rows: int) -> Path:
    """Writes prompts of many lengths, taken from the text, as JSONL and returns the path."""
    rows = [{"prompt": f"# {start}\n{TEXT[start : start + 10 + start % 70]}"} for start in range(0, 97 * num_rows, 97)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def some_prompts(folder: Path, num_rows: int) -> list[Prompt]:
    return load_prompts(str(write_prompts(folder / "prompts.jsonl", num_rows)), trained_tokenizer())


def kill_midway(recipe: str, flags: list[str], is_started: Callable[[], bool]) -> None:
    """Runs a recipe in another process and kills it (signal 9) at a random moment after `is_started`."""
    root = Path(__file__).resolve().parents[2]
    running = ForkedRun([str(root / "recipes" / f"{recipe}.py"), *flags], root, dict(os.environ))
    while not is_started():
        assert running.process.is_alive(), running.wait(timeout_s=1)
        time.sleep(0.002)
    time.sleep(random.uniform(0, 0.2))
    running.process.kill()
    assert running.wait(timeout_s=60).returncode == -signal.SIGKILL, "it ended before it could be killed"
