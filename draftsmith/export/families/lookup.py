"""Prompt lookup, which every server has of its own: settings, no weights."""

from pathlib import Path

from draftsmith.export.given import Given
from draftsmith.export.launch import Launch, for_sglang, for_vllm, in_python


def for_transformers(given: Given, folder: Path) -> Launch:
    """Writes a generation config."""
    config, settings = given.config, given.generation_config
    settings.update(prompt_lookup_num_tokens=config.num_draft, max_matching_ngram_size=config.max_ngram)
    settings.save_pretrained(folder)
    shorter = ("transformers looks for runs down to a single token.",) if config.min_ngram > 1 else ()
    return in_python(
        given,
        f"settings = GenerationConfig.from_pretrained({str(given.output)!r})",
        "model.generate(**inputs, generation_config=settings, max_new_tokens=64, do_sample=False)",
        notes=(*shorter, *_notes(given), "transformers drafts for one row at a time."),
        prompt_lookup_num_tokens=config.num_draft,
        max_matching_ngram_size=config.max_ngram,
    )


def vllm(given: Given, folder: Path) -> Launch:
    """Returns the settings of vLLM's own lookup."""
    config = given.config
    settings = {"method": "ngram", "num_speculative_tokens": config.num_draft}
    settings |= {"prompt_lookup_max": config.max_ngram, "prompt_lookup_min": config.min_ngram}
    return for_vllm(given, settings, notes=_notes(given))


def sglang(given: Given, folder: Path) -> Launch:
    """Returns the settings of SGLang's, which looks at what it has generated for all requests."""
    config = given.config
    settings = {
        "algorithm": "NGRAM",
        "num-draft-tokens": config.num_draft + 1,
        "ngram-max-trie-depth": config.max_ngram + config.num_draft,
        "ngram-max-bfs-breadth": config.num_continuations,
    }
    return for_sglang(given, settings)


def _notes(given: Given) -> tuple[str, ...]:
    return ("Only the latest place is copied from.",) if given.config.num_continuations > 1 else ()


WRITERS = {"transformers": for_transformers, "vllm": vllm, "sglang": sglang}
