"""Exports draft models as transformers folders, among them the target reduced to some of its blocks.

Shape suffixes: B rows, N tokens, D hidden width, V vocabulary.
"""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig

from draftsmith.core.target import Target
from draftsmith.core.tree import chain
from draftsmith.core.views import LAYER_LISTS, final_norm, find_child
from draftsmith.export.launch import SAMPLES_DRAFTS, Launch, check_path, python_launch, sglang_launch, vllm_launch
from draftsmith.export.source import ExportSource
from draftsmith.length import policies
from draftsmith.loading.precision import cast
from draftsmith.parts.self_drafting.sublayers import sublayers

NUM_COMPARED = 8
SCIKIT_LEARN = (
    "Where scikit-learn is installed, transformers moves the confidence threshold while it drafts with an assistant;"
    " draftsmith keeps it."
)
ASSISTED = (
    "transformers drafts for a batch of one only, and 5.23 hides the pad token from its assistant where the text"
    " contains it and it ends no text: then fewer tokens are accepted than by draftsmith, and the text is the same."
)
CHAINS = "Servers draft chains, whereas draftsmith drafts trees with this drafter."
FIXED = "Servers draft a fixed number of tokens, whereas draftsmith's length policy stops earlier: try fewer tokens."

ModelFactory = Callable[[ExportSource], Any]
"""Returns the transformers model to be written; raises ValueError if the drafter is not an ordinary model."""


def write_model(source: ExportSource, folder: Path, model: Any) -> None:
    """Writes a draft model in the target's dtype, with the target's tokenizer and transformers' assistant settings.

    Raises ValueError if the written folder does not load as the same model.
    """
    special = ("bos_token_id", "eos_token_id", "pad_token_id")
    model.generation_config = GenerationConfig(
        **{name: getattr(source.generation_config, name) for name in special}, **assistant_settings(source.config)
    )
    model.save_pretrained(folder)
    source.save_tokenizer(folder)
    source.save_target(folder)
    loaded, loading_info = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    different = [name for names in loading_info.values() for name in names]
    before, after = model.state_dict(), loaded.state_dict()
    different += [name for name, weight in before.items() if name not in after or not torch.equal(weight, after[name])]
    if different:
        raise ValueError(f"{type(model).__name__} does not load as it was written: {different[0]} differs")


def assistant_settings(config: Any) -> dict[str, Any]:
    """Returns the draft length and its policy as transformers reads them: from the assistant's own generation config.

    A confidence threshold is the only early-stop policy that transformers supports.
    """
    policy = policies.make(config.length) if config.supports_early_stop else policies.Fixed()
    return {
        "num_assistant_tokens": config.num_draft,
        "num_assistant_tokens_schedule": "constant",
        "assistant_confidence_threshold": policy.threshold if isinstance(policy, policies.Confidence) else 0.0,
    }


def length_notes(config: Any) -> tuple[str, ...]:
    """Returns how an assistant of transformers differs from the drafter in the shape and the length of its drafts."""
    notes = (CHAINS,) if getattr(config, "tree", ()) or config.width else ()
    if not config.supports_early_stop or config.length == "fixed":
        return notes
    is_confidence = isinstance(policies.make(config.length), policies.Confidence)
    return (*notes, SCIKIT_LEARN if is_confidence else FIXED)


def assistant_writer(make_model: ModelFactory) -> Callable[[ExportSource, Path], Launch]:
    """Returns a writer of `make_model`'s model as an assistant model of transformers."""

    def write(source: ExportSource, folder: Path) -> Launch:
        write_model(source, folder, make_model(source))
        return python_launch(
            source,
            f"assistant = AutoModelForCausalLM.from_pretrained({str(source.output)!r})",
            "model.generate(**inputs, assistant_model=assistant, max_new_tokens=64, do_sample=False)",
            notes=(*length_notes(source.config), ASSISTED),
            assistant_model=str(source.output),
        )

    return write


def vllm_draft_model_writer(
    make_model: ModelFactory, *notes: str, **options: Any
) -> Callable[[ExportSource, Path], Launch]:
    """Returns a writer of `make_model`'s model as a draft model of vLLM, with further settings of vLLM in `options`."""

    def write(source: ExportSource, folder: Path) -> Launch:
        check_path(source)
        write_model(source, folder, make_model(source))
        settings: dict[str, Any] = {"method": "draft_model", "model": str(source.output)}
        settings |= {"num_speculative_tokens": source.config.num_draft} | SAMPLES_DRAFTS | options
        return vllm_launch(source, settings, notes=(*notes, *_notes(source)))

    return write


def sglang_draft_model_writer(make_model: ModelFactory, *notes: str) -> Callable[[ExportSource, Path], Launch]:
    """Returns a writer of `make_model`'s model as a draft model of SGLang."""

    def write(source: ExportSource, folder: Path) -> Launch:
        write_model(source, folder, make_model(source))
        num_draft = source.config.num_draft
        settings: dict[str, Any] = {"algorithm": "STANDALONE", "draft-model-path": str(source.output)}
        settings |= {"num-steps": num_draft, "eagle-topk": 1, "num-draft-tokens": num_draft + 1}
        return sglang_launch(source, settings, notes=(*notes, *_notes(source)))

    return write


@torch.inference_mode()
def reduced_model(
    target: Target, kept: Sequence[int], *, norm: nn.Module | None = None, head: nn.Module | None = None
) -> Any:
    """Returns a new model with the `kept` blocks of the target, optionally with another final norm or output matrix.

    Raises ValueError if the architecture does not allow that: the model's logits on a few tokens must be those of the
    target with the other blocks skipped.
    """
    model = target.model
    config = copy.deepcopy(model.config)
    text = config.get_text_config(decoder=True)
    text.num_hidden_layers = len(kept)
    if getattr(text, "layer_types", None):
        text.layer_types = [text.layer_types[block] for block in kept]
    if head is not None:
        config.tie_word_embeddings = text.tie_word_embeddings = False
    try:
        small = cast(type(model)(config), target.dtype).eval()
        prefix, stack = _stack_of(model)
        blocks = find_child(stack, LAYER_LISTS, "list of blocks")
        weights = model.state_dict()
        small.load_state_dict(
            {name: weights[_target_name(name, f"{prefix}{blocks}.", kept)] for name in small.state_dict()}
        )
        if norm is not None:
            getattr(_stack_of(small)[1], final_norm(stack) or "").load_state_dict(norm.state_dict())
        if head is not None:
            small.get_output_embeddings().load_state_dict(head.state_dict())
        ids_1N = torch.arange(NUM_COMPARED)[None] % target.vocab_size
        found_1NV = small(input_ids=ids_1N).logits
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{type(model).__name__} cannot be reduced to {len(kept)} blocks: {error}") from error
    others = tuple(block for block in range(target.num_layers) if block not in kept)
    expected_1NV = _logits(target, ids_1N, others, norm, head)
    tolerance = 1e-3 if target.dtype in (torch.float32, torch.float64) else 0.1
    gap = (found_1NV - expected_1NV).abs().max() / expected_1NV.abs().max().clamp(min=1)
    if not gap < tolerance:
        raise ValueError(
            f"{type(model).__name__} reduced to {len(kept)} blocks differs from the model with the other blocks skipped"
            f" (relative error of the logits {gap:.2g}); run the drafter with draftsmith"
        )
    return small


def _logits(
    target: Target, ids_1N: Tensor, others: tuple[int, ...], norm: nn.Module | None, head: nn.Module | None
) -> Tensor:
    """Returns the target's logits [1, N, V] with the `others` skipped."""
    skipped = sublayers(others, others)
    out = target.forward(ids_1N, chain(ids_1N.shape[1]), target.new_cache(1), skipped=skipped)
    normed_1ND = target.norm(out.hidden_BND) if norm is None else norm(out.hidden_BND)
    return target.head(normed_1ND) if head is None else head(normed_1ND)


def _stack_of(model: Any) -> tuple[str, nn.Module]:
    """Returns (prefix of its parameters' names, decoder stack)."""
    decoder = model.get_decoder()
    (name,) = [name for name, module in model.named_modules() if module is decoder]
    return f"{name}.", decoder


def _target_name(name: str, blocks: str, kept: Sequence[int]) -> str:
    """Returns the target's name for a parameter of the reduced model."""
    if not name.startswith(blocks):
        return name
    number, _, inner = name.removeprefix(blocks).partition(".")
    return f"{blocks}{kept[int(number)]}.{inner}"


def _notes(source: ExportSource) -> tuple[str, ...]:
    config = source.config
    if not config.supports_early_stop:
        return (CHAINS,)
    return (FIXED,) if config.length != "fixed" else ()
