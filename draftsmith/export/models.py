"""Draft models as ordinary transformers folders, among them the target with blocks left out.

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
from draftsmith.export.given import Given
from draftsmith.export.launch import Launch, check_path, for_sglang, for_vllm, in_python
from draftsmith.length import policies
from draftsmith.parts.self_drafting.sublayers import sublayers

NUM_COMPARED = 8
CHAINS = "Servers draft chains; the trees that draftsmith drafts with it stay behind."
FIXED = "Servers draft as many tokens each time; draftsmith stops where its policy of lengths says so: try fewer."

Maker = Callable[[Given], Any]
"""Returns the transformers model to be written, or raises ValueError if the drafter is none."""


def write_model(given: Given, folder: Path, model: Any) -> None:
    """Writes a draft model in the target's dtype, with the target's tokenizer and how transformers is to draft with it.

    Raises ValueError if what was written does not load as the same model.
    """
    drafter, config = given.drafter, given.config
    model.to(drafter.target.dtype)
    ends = {name: getattr(given.generation_config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    # Of policies that stop where the draft model is unsure transformers has the one of a threshold.
    threshold = getattr(policies.make(config.length), "threshold", 0.0) if config.asks_length else 0.0
    model.generation_config = GenerationConfig(
        **ends,
        num_assistant_tokens=config.num_draft,
        num_assistant_tokens_schedule="constant",
        assistant_confidence_threshold=threshold,
    )
    model.save_pretrained(folder)
    given.save_tokenizer(folder)
    given.save_target(folder)
    again, said = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    wrong = [name for names in said.values() for name in names]
    before, after = model.state_dict(), again.state_dict()
    wrong += [name for name, weight in before.items() if name not in after or not torch.equal(weight, after[name])]
    if wrong:
        raise ValueError(f"{type(model).__name__} does not load as it was written: {wrong[0]} differs")


def for_transformers(make: Maker) -> Callable[[Given, Path], Launch]:
    """Returns what writes the model that `make` returns as an assistant of transformers."""

    def write(given: Given, folder: Path) -> Launch:
        write_model(given, folder, make(given))
        return in_python(
            given,
            f"assistant = AutoModelForCausalLM.from_pretrained({str(given.output)!r})",
            "model.generate(**inputs, assistant_model=assistant, max_new_tokens=64, do_sample=False)",
            notes=(*_notes(given), "transformers drafts for one row at a time."),
            assistant_model=str(given.output),
        )

    return write


def for_draft_model(make: Maker, *notes: str) -> Callable[[Given, Path], Launch]:
    """Returns what writes the model that `make` returns as a draft model of vLLM."""

    def write(given: Given, folder: Path) -> Launch:
        check_path(given)
        write_model(given, folder, make(given))
        settings: dict[str, Any] = {"method": "draft_model", "model": str(given.output)}
        return for_vllm(
            given, settings | {"num_speculative_tokens": given.config.num_draft}, notes=(*notes, *_notes(given))
        )

    return write


def for_standalone(make: Maker, *notes: str) -> Callable[[Given, Path], Launch]:
    """Returns what writes the model that `make` returns as a draft model of SGLang."""

    def write(given: Given, folder: Path) -> Launch:
        write_model(given, folder, make(given))
        num_draft = given.config.num_draft
        settings: dict[str, Any] = {"algorithm": "STANDALONE", "draft-model-path": str(given.output)}
        settings |= {"num-steps": num_draft, "eagle-topk": 1, "num-draft-tokens": num_draft + 1}
        return for_sglang(given, settings, notes=(*notes, *_notes(given)))

    return write


@torch.inference_mode()
def cut(target: Target, kept: Sequence[int], *, norm: nn.Module | None = None, head: nn.Module | None = None) -> Any:
    """Returns a model of its own: the target with these blocks alone, and perhaps another final norm or output matrix.

    Raises ValueError for an architecture whose blocks do not stand for themselves: its logits on a few tokens must be
    those of the target with the other blocks left out.
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
        small = type(model)(config).to(target.dtype).eval()
        before, stack = _stack_of(model)
        blocks = find_child(stack, LAYER_LISTS, "list of blocks")
        given = model.state_dict()
        small.load_state_dict(
            {name: given[_in_target(name, f"{before}{blocks}.", kept)] for name in small.state_dict()}
        )
        if norm is not None:
            getattr(_stack_of(small)[1], final_norm(stack) or "").load_state_dict(norm.state_dict())
        if head is not None:
            small.get_output_embeddings().load_state_dict(head.state_dict())
        ids_1N = torch.arange(NUM_COMPARED)[None] % target.vocab_size
        found_1NV = small(input_ids=ids_1N).logits
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{type(model).__name__} cannot be cut down to {len(kept)} blocks: {error}") from error
    others = tuple(block for block in range(target.num_layers) if block not in kept)
    expected_1NV = _logits(target, ids_1N, others, norm, head)
    tolerance = 1e-3 if target.dtype in (torch.float32, torch.float64) else 0.1
    gap = (found_1NV - expected_1NV).abs().max() / expected_1NV.abs().max().clamp(min=1)
    if not gap < tolerance:
        raise ValueError(
            f"{type(model).__name__} cut down to {len(kept)} blocks is another model than with the others left out (off"
            f" by {gap:.2g}); run the drafter with draftsmith"
        )
    return small


def _logits(
    target: Target, ids_1N: Tensor, others: tuple[int, ...], norm: nn.Module | None, head: nn.Module | None
) -> Tensor:
    """Returns the target's logits [1, N, V] without these blocks."""
    skipped = sublayers(others, others)
    out = target.forward(ids_1N, chain(ids_1N.shape[1]), target.new_cache(1), skipped=skipped)
    normed_1ND = target.norm(out.hidden_BND) if norm is None else norm(out.hidden_BND)
    return target.head(normed_1ND) if head is None else head(normed_1ND)


def _stack_of(model: Any) -> tuple[str, nn.Module]:
    """Returns the decoder stack and what stands before its parameters' names."""
    decoder = model.get_decoder()
    (name,) = [name for name, module in model.named_modules() if module is decoder]
    return f"{name}.", decoder


def _in_target(name: str, blocks: str, kept: Sequence[int]) -> str:
    """Returns what a parameter of the smaller model is called in the target."""
    if not name.startswith(blocks):
        return name
    number, _, inner = name.removeprefix(blocks).partition(".")
    return f"{blocks}{kept[int(number)]}.{inner}"


def _notes(given: Given) -> tuple[str, ...]:
    config = given.config
    trees = (CHAINS,) if getattr(config, "tree", ()) or config.width else ()
    return (*trees, FIXED) if config.asks_length and config.length != "fixed" else trees
