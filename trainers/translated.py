"""Makes a drafter of a draft LM with another tokenizer: an existing one, or a small one trained on the target's text.

Shape suffixes: N blocks, T positions of a block, U tokens of the draft model's vocabulary.
"""

import dataclasses
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import IntervalStrategy

from data.batches import Example, order
from draftsmith import Target
from draftsmith.artifacts.files import atomic_folder
from draftsmith.drafters.translated import Config, Drafter, translation
from draftsmith.loading import remote_code
from draftsmith.loading.model_info import TargetInfo, read_target_info, tokenizer_hash
from draftsmith.loading.target_names import model_folder
from draftsmith.loading.weights import load_model
from draftsmith.parts.checks import MAX_DEPTH, MAX_WIDTH, check_at_least
from trainers.corpora import evaluation
from trainers.parts import small_models
from trainers.pocket import BOS, EOS, PAD, MuonAndAdamW, byte_pairs
from trainers.training import checkpoints, launchers
from trainers.training.gradient import training_arguments
from trainers.training.logs import JsonlCallback
from trainers.training.run_settings import RunSettings

NUM_SPECIAL_AND_BYTES = 3 + 256


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The draft model and its drafts; given `--draft-model`, `--max-steps` and optimiser settings have no effect."""

    draft_model: str = ""
    """Transformers folder or hub name of a causal LM with a fast tokenizer, used unchanged; empty to train one."""
    train_vocab: int = 2048
    """Vocabulary size of a trained draft model: a byte-level BPE and a small Llama, also saved in draft-model."""
    num_layers: int = 1
    """Number of layers of a trained draft model."""
    hidden_size: int = 256
    """Width of a trained draft model."""
    num_heads: int = 4
    """Number of attention heads of a trained draft model."""
    least_shared: int = 100
    """Smallest number of tokens that both vocabularies must share; only these are drafted when sampling."""
    config: Config = field(
        default=Config(model={"model_type": "", "vocab_size": 0}, tokenizer_hash="unknown"),
        metadata={"omit": ("model", "tokenizer_hash", "counterparts")},
    )

    def __post_init__(self) -> None:
        check_at_least(self, 1, "num_layers", "num_heads", most=MAX_DEPTH)
        check_at_least(self, 1, "least_shared", "train_vocab")
        check_at_least(self, 1, "hidden_size", most=MAX_WIDTH)
        if self.train_vocab <= NUM_SPECIAL_AND_BYTES:
            raise ValueError(f"train_vocab is {self.train_vocab}; a byte-level BPE needs {NUM_SPECIAL_AND_BYTES + 1}")
        if self.hidden_size < 1 or self.hidden_size % (2 * self.num_heads):
            raise ValueError(f"hidden_size {self.hidden_size} must be a multiple of twice num_heads, {self.num_heads}")


def check(settings: Settings, target: TargetInfo) -> None:
    """Raises ValueError, from the folders alone, if a tokenizer is missing or too few tokens are shared."""
    if target.tokenizer is None:
        raise ValueError(f"target {target.name} has no tokenizer; one is needed to compare the vocabularies")
    if settings.draft_model:
        draft = read_target_info(settings.draft_model)
        if draft.tokenizer is None or draft.is_encoder_decoder:
            raise ValueError(f"--draft-model {settings.draft_model} is not a causal LM with a tokenizer")
        config = {"model_type": "", "vocab_size": draft.vocab_size} | _special(draft.tokenizer)
        hashed = Config(model=config, tokenizer_hash=str(draft.tokenizer_hash))
        _check_shared(settings, translation(hashed, draft.tokenizer, target).counterparts(), target.name)
    elif launchers.num_ranks() > 1:
        raise ValueError("a draft model is trained in a single process; run without torchrun and deepspeed")


needs, evaluate = evaluation.needs, evaluation.evaluate


def fit(settings: Settings, target: Target, rows: Sequence[Example], run: RunSettings, output: Path) -> Drafter:
    """Returns the drafter of the given model, or of one trained on the rows' text, continuing an interrupted run."""
    folder = Path(settings.draft_model or output / "draft-model")
    if not settings.draft_model and not (folder / "config.json").exists():
        _train(settings, target, rows, run, output, folder)
    draft = read_target_info(str(folder) if folder.is_dir() else settings.draft_model)
    options = {"dtype": torch.float32, "trust_remote_code": remote_code.is_allowed()}
    given = load_model(AutoModelForCausalLM, model_folder(draft.name), **options)
    drafter = _drafter(settings, given, draft.tokenizer, target)
    drafter.model.load_state_dict(given.state_dict())
    counterparts = drafter.counterparts_U.tolist()
    _check_shared(settings, counterparts, target.name)
    num_shared = sum(token >= 0 for token in counterparts)
    print(
        f"{draft.name} has {num_shared:,} of its {len(counterparts):,} tokens in common with the {target.vocab_size:,}"
        f" of {target.name}"
    )
    return drafter


def _check_shared(settings: Settings, counterparts: Sequence[int], name: str) -> None:
    num_shared = sum(token >= 0 for token in counterparts)
    if num_shared < settings.least_shared:
        raise ValueError(
            f"the draft model's vocabulary has {num_shared} tokens in common with that of {name}, fewer than"
            f" least_shared ({settings.least_shared}); only shared tokens are drafted when sampling"
        )


def _drafter(settings: Settings, model: Any, tokenizer: Any, target: Target) -> Drafter:
    config = dataclasses.replace(
        settings.config,
        # as_dict leaves out a size that is the architecture's default.
        model=small_models.as_dict(model.config) | {"vocab_size": model.config.vocab_size} | _special(tokenizer),
        tokenizer_hash=str(tokenizer_hash(tokenizer)),
    )
    return Drafter(config, target, tokenizer)


def _special(tokenizer: Any) -> dict[str, Any]:
    return {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}


# --- Training a draft model ----------------------------------------------------------------------------------------


def _train(
    settings: Settings, target: Target, rows: Sequence[Example], run: RunSettings, output: Path, folder: Path
) -> None:
    """Trains tokenizer and model on the rows' text and writes a transformers folder atomically."""
    torch.manual_seed(run.seed)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_pairs(_texts(target, rows), settings.train_vocab),
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        clean_up_tokenization_spaces=False,
    )
    config = small_models.llama(
        vocab_size=len(tokenizer),
        width=settings.hidden_size,
        num_layers=settings.num_layers,
        num_heads=settings.num_heads,
        # A smaller vocabulary needs more tokens for the same text.
        context_length=2 * target.context_length,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    drafter = _drafter(settings, model, tokenizer, target)
    _init_embedding(model, drafter.counterparts_U, target)
    blocks_NT = _blocks(drafter, rows, run)
    print(f"{sum(weight.numel() for weight in model.parameters()):,} parameters, {blocks_NT.numel():,} tokens of text")
    arguments = training_arguments(run, output, None)
    arguments.eval_strategy, arguments.disable_tqdm = IntervalStrategy.NO, False
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=[{"input_ids": block, "labels": block} for block in blocks_NT],
        optimizers=(MuonAndAdamW(model.to(arguments.device), learning_rate=run.learning_rate), None),
        callbacks=[JsonlCallback(output / "log.jsonl"), _MarkComplete(output)],
    )
    resumed = checkpoints.newest_complete(output)
    trainer.train(resume_from_checkpoint=str(checkpoints.folder(output, resumed[0])) if resumed else None)
    with atomic_folder(folder, marker="config.json") as staging:
        model.eval().save_pretrained(staging)
        tokenizer.save_pretrained(staging)
    shutil.rmtree(output / "checkpoints", ignore_errors=True)


class _MarkComplete(TrainerCallback):
    """Marks each complete checkpoint, so that a run killed while writing one continues from the one before."""

    def __init__(self, output: Path) -> None:
        self._output = output

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        checkpoints.mark_complete(checkpoints.folder(self._output, state.global_step), {})
        checkpoints.keep_only(self._output, {state.global_step})


@torch.no_grad()
def _init_embedding(model: LlamaForCausalLM, counterparts_U: Tensor, target: Target) -> None:
    """Initialises the embeddings of shared tokens from the target's, if the widths are the same."""
    own, theirs = model.get_input_embeddings().weight, target.model.get_input_embeddings().weight
    if own.shape[1] == theirs.shape[1]:
        is_shared_U = (counterparts_U >= 0).to(own.device)
        own[is_shared_U] = theirs[counterparts_U[counterparts_U >= 0]].to(own)


def _texts(target: Target, rows: Sequence[Example]) -> Iterator[str]:
    for index in range(len(rows)):
        yield target.tokenizer.decode(rows[index].tokens_T, skip_special_tokens=True)


def _blocks(drafter: Drafter, rows: Sequence[Example], run: RunSettings) -> Tensor:
    """Packs the rows, translated and in an order that depends on the seed, into blocks [N, T]."""
    ids = [
        token
        for index in order(len(rows), seed=run.seed, epoch=0)
        for token in drafter.translation.to_draft_ids(rows[index].tokens_T.tolist())
    ]
    num_blocks = len(ids) // run.max_length
    if num_blocks < run.batch_size:
        raise ValueError(
            f"{run.data} has {len(ids):,} tokens in the draft model's vocabulary, fewer than one step's"
            f" {run.batch_size} blocks of {run.max_length}; give more text or a smaller --max-length"
        )
    return torch.tensor(ids[: num_blocks * run.max_length]).view(num_blocks, run.max_length)
