"""Trains the two pocket targets, the default targets: a small Llama on Python source and a T5 on docstrings.

Shape suffixes: N blocks, T positions.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    DataCollatorForSeq2Seq,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint

from data.folder_lock import locked
from data.sources.python_source import SourceFile, docstring_pairs, source_files, split_files
from draftsmith.artifacts.files import atomic_folder
from draftsmith.loading.precision import cast

VOCAB_SIZE = 4096
PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"
SOURCE_TOKENS, LABEL_TOKENS = 384, 64
"""Largest numbers of source and label tokens of the encoder-decoder."""


@dataclass(frozen=True, kw_only=True)
class PocketSettings:
    """Settings of `recipes/pocket.py`."""

    output: str = "data/pocket"
    """Folder for the causal target; the seq2seq one is saved beside it with `-seq2seq` appended."""
    work: str = "runs/pocket"
    """Folder for the tokenizer and checkpoints of the unfinished run."""
    kind: str = field(default="both", metadata={"choices": ["causal", "seq2seq", "both"]})
    """Target to train."""
    max_steps: int = 2400
    """Optimiser steps of the causal target; can be changed when resuming, until the learning rate decays."""
    seq2seq_steps: int = 1500
    """Optimiser steps of the seq2seq target."""
    batch_size: int = 4
    """Blocks per step."""
    block_length: int = 1024
    """Tokens per block, and the target's context length."""
    learning_rate: float = 3e-3
    """Peak rate of Muon (matrices, scaled to AdamW's update size) and of AdamW (the rest)."""
    save_steps: int = 50
    """Steps between checkpoints."""
    held_out_share: float = 0.02
    """Fraction of files held out, chosen by a hash of their names and the seed."""
    max_files: int = 0
    """Number of files used, 0 for all: for a quick trial."""
    seed: int = 0
    """Seed of the split, the initial weights and the order of files."""


class Corpus(NamedTuple):
    """Source files and their tokenizer."""

    tokenizer: PreTrainedTokenizerFast
    train_files: list[SourceFile]
    held_out_files: list[SourceFile]


class MuonAndAdamW(torch.optim.Optimizer):
    """Muon for the matrices of the blocks and AdamW for the rest, as one optimiser with one learning rate.

    Source: Jordan et al. 2024, "Muon: an optimizer for hidden layers"; step size matched to AdamW's as in
    Liu et al. 2025 (2502.16982).
    """

    def __init__(self, model: torch.nn.Module, *, learning_rate: float) -> None:
        linear = [module.weight for module in model.modules() if isinstance(module, torch.nn.Linear)]
        embedding = [module.weight for module in model.modules() if isinstance(module, torch.nn.Embedding)]
        hidden = {id(weight) for weight in linear} - {id(weight) for weight in embedding}
        matrices = [p for p in model.parameters() if id(p) in hidden]
        rest = [p for p in model.parameters() if id(p) not in hidden]
        self.parts = [
            torch.optim.Muon(matrices, lr=learning_rate, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0),
        ]
        super().__init__([{"params": matrices}, {"params": rest}], {"lr": learning_rate})
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self.parts for group in part.param_groups]


def train_pocket(settings: PocketSettings) -> None:
    """Trains the selected targets, continuing an unfinished run in `settings.work`, and writes their folders."""
    files = source_files()
    if settings.max_files:
        files = files[:: max(1, len(files) // settings.max_files)]
    train_files, held_out_files = split_files(files, held_out_share=settings.held_out_share, seed=settings.seed)
    work = Path(settings.work)
    with locked(work):
        tokenizer = _tokenizer(train_files, work / "tokenizer.json", settings.block_length)
        corpus = Corpus(tokenizer, train_files, held_out_files)
        if settings.kind != "seq2seq":
            _train_causal(settings, corpus)
        if settings.kind != "causal":
            _train_seq2seq(settings, corpus)


def _train_causal(settings: PocketSettings, corpus: Corpus) -> None:
    torch.manual_seed(settings.seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=256,
            intermediate_size=704,
            num_hidden_layers=8,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=settings.block_length,
            tie_word_embeddings=True,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )
    blocks_NT = _blocks(corpus.tokenizer, corpus.train_files, settings)
    held_out_NT = _blocks(corpus.tokenizer, corpus.held_out_files, settings)
    dataset = [{"input_ids": block, "labels": block} for block in blocks_NT]
    _fit(model, dataset, settings, max_steps=settings.max_steps, work=Path(settings.work) / "causal")
    loss = _mean_loss(model, ({"input_ids": block[None], "labels": block[None]} for block in held_out_NT))
    bytes_per_token = _bytes_per_token(corpus.tokenizer, corpus.held_out_files)
    facts = {
        "held_out_nats_per_token": round(loss, 4),
        "held_out_nats_per_byte": round(loss / bytes_per_token, 4),
        "held_out_bytes_per_token": round(bytes_per_token, 3),
        "train_tokens_available": blocks_NT.numel(),
        "train_tokens_seen": settings.max_steps * settings.batch_size * settings.block_length,
    }
    _save(model, corpus, Path(settings.output), settings, facts)


def _train_seq2seq(settings: PocketSettings, corpus: Corpus) -> None:
    torch.manual_seed(settings.seed)
    tokenizer = corpus.tokenizer
    tokenizer.model_max_length = SOURCE_TOKENS  # the length to which its users then truncate sources
    model = T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCAB_SIZE,
            d_model=256,
            d_kv=64,
            d_ff=704,
            num_layers=4,
            num_decoder_layers=3,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=True,
            dropout_rate=0.0,
            decoder_start_token_id=0,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )
    _init_embedding(model, Path(settings.output))
    datasets = []
    for files in (corpus.train_files, corpus.held_out_files):
        pairs = docstring_pairs([file for file in files if file.name.startswith("stdlib/")])
        sources = tokenizer([source for source, _ in pairs], truncation=True, max_length=SOURCE_TOKENS)["input_ids"]
        labels = [summary + EOS for _, summary in pairs]
        targets = tokenizer(labels, truncation=True, max_length=LABEL_TOKENS)["input_ids"]
        datasets.append([{"input_ids": s, "labels": t} for s, t in zip(sources, targets, strict=True)])
    collate = DataCollatorForSeq2Seq(tokenizer, model=model)
    work = Path(settings.work) / "seq2seq"
    _fit(model, datasets[0], settings, max_steps=settings.seq2seq_steps, work=work, batch_size=16, collate=collate)
    loss = _mean_loss(model, (collate([pair]) for pair in datasets[1]))
    facts = {
        "held_out_nats_per_token": round(loss, 4),
        "train_pairs": len(datasets[0]),
        "held_out_pairs": len(datasets[1]),
        "train_pairs_seen": settings.seq2seq_steps * 16,
    }
    output = Path(settings.output)
    _save(model, corpus, output.with_name(output.name + "-seq2seq"), settings, facts)


def _init_embedding(model: T5ForConditionalGeneration, causal: Path) -> None:
    """Initialises the embedding from the causal target if it exists: five thousand pairs are too few to train one."""
    if not (causal / "model.safetensors").exists():
        return
    theirs = LlamaForCausalLM.from_pretrained(causal, dtype=torch.float32).get_input_embeddings().weight.detach()
    # T5 divides its logits by the root of the width, and therefore needs entries of size 1.
    model.shared.weight.data.copy_(theirs / theirs.std())


def _fit(
    model: PreTrainedModel,
    dataset: list[dict[str, Any]],
    settings: PocketSettings,
    *,
    max_steps: int,
    work: Path,
    batch_size: int | None = None,
    collate: Any = None,
) -> None:
    arguments = TrainingArguments(
        output_dir=str(work),
        max_steps=max_steps,
        per_device_train_batch_size=batch_size or settings.batch_size,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="warmup_stable_decay",
        warmup_steps=50,
        lr_scheduler_kwargs={"num_decay_steps": max_steps // 3, "min_lr_ratio": 0.02},
        max_grad_norm=1.0,
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
        logging_steps=10,
        save_steps=settings.save_steps,
        save_total_limit=2,
        seed=settings.seed,
        report_to="none",
        remove_unused_columns=False,
    )
    optimizer = MuonAndAdamW(model.to(arguments.device), learning_rate=settings.learning_rate)
    trainer = Trainer(
        model=model, args=arguments, train_dataset=dataset, data_collator=collate, optimizers=(optimizer, None)
    )
    work.mkdir(parents=True, exist_ok=True)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(work)))
    model.eval()


def _tokenizer(files: list[SourceFile], path: Path, context_length: int) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE of `VOCAB_SIZE` on the training files, or loads the one of an earlier session."""
    if not path.exists():
        byte_pairs((file.text for file in files), VOCAB_SIZE).save(str(path.with_suffix(".part")))
        path.with_suffix(".part").rename(path)
    return PreTrainedTokenizerFast(
        tokenizer_file=str(path),
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        model_max_length=context_length,
        clean_up_tokenization_spaces=False,
    )


def byte_pairs(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Returns a byte-level BPE trained on the texts, its first three tokens special."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = [PAD, BOS, EOS]
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special, initial_alphabet=sorted(alphabet))
    bpe.train_from_iterator(texts, trainer)
    return bpe


def _blocks(tokenizer: PreTrainedTokenizerFast, files: list[SourceFile], settings: PocketSettings) -> torch.Tensor:
    """Packs `<bos> file <eos>`, files in an order that depends on the seed, into blocks [N, T]."""
    order = np.random.default_rng(settings.seed).permutation(len(files))
    encoded = tokenizer([BOS + files[index].text + EOS for index in order])["input_ids"]
    ids = torch.tensor([token for file in encoded for token in file])
    num_blocks = len(ids) // settings.block_length
    return ids[: num_blocks * settings.block_length].view(num_blocks, settings.block_length)


@torch.inference_mode()
def _mean_loss(model: PreTrainedModel, batches: Iterable[dict[str, torch.Tensor]]) -> float:
    total, count = 0.0, 0
    for batch in batches:
        batch = {name: value.to(model.device) for name, value in batch.items()}
        num_labels = int((batch["labels"] != -100).sum())
        total, count = total + float(model(**batch).loss) * num_labels, count + num_labels
    return total / count


def _bytes_per_token(tokenizer: PreTrainedTokenizerFast, files: list[SourceFile]) -> float:
    encoded = tokenizer([file.text for file in files])["input_ids"]
    return sum(len(file.text.encode()) for file in files) / sum(map(len, encoded))


def _save(
    model: PreTrainedModel, corpus: Corpus, output: Path, settings: PocketSettings, facts: dict[str, Any]
) -> None:
    """Writes bf16 weights, tokenizer, generation_config and the card atomically."""
    assert math.isfinite(facts["held_out_nats_per_token"])
    facts |= {"train_files": len(corpus.train_files), "held_out_files": len(corpus.held_out_files)}
    facts["train_data_sha256"] = hashlib.sha256("".join(file.text for file in corpus.train_files).encode()).hexdigest()
    held_out = [file.name for file in corpus.held_out_files]
    with atomic_folder(output, marker="pocket.json") as folder:
        cast(model, torch.bfloat16).save_pretrained(folder)
        corpus.tokenizer.save_pretrained(folder)
        record = {"settings": settings.__dict__, "facts": facts, "held_out": held_out}
        (folder / "pocket.json").write_text(json.dumps(record, indent=1) + "\n")
        (folder / "README.md").write_text(_card(model, settings, facts))


def _card(model: PreTrainedModel, settings: PocketSettings, facts: dict[str, Any]) -> str:
    kind = "seq2seq" if model.config.is_encoder_decoder else "causal"
    lines = [f"| {key.replace('_', ' ')} | {value} |" for key, value in facts.items()]
    flags = f"--max-steps {settings.max_steps} --seq2seq-steps {settings.seq2seq_steps} --seed {settings.seed}"
    task = "function source in, first docstring line out" if kind == "seq2seq" else "Python source, continued"
    return "\n".join(
        [
            f"# Pocket target ({kind})",
            "",
            f"{sum(p.numel() for p in model.parameters()):,} parameters, {model.config.model_type}; {task}.",
            "It is a target for tests and examples, on any machine and without a download; its code is not useful.",
            "",
            f"Made by `python recipes/pocket.py --kind {kind} {flags}`.",
            "",
            "| fact | value |",
            "| --- | --- |",
            *lines,
            "",
            "Data: Python files of the standard library (PSF licence) and, for the causal target, of the packages",
            "named in `data/sources/python_source.py` (Apache-2.0, BSD-3-Clause, MIT), without tests. Whole files are",
            "held out by a hash of their names (listed in `pocket.json`); near duplicates of them are removed too.",
            "",
        ]
    )
