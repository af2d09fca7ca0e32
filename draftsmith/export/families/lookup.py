"""Exports prompt lookup, which every server implements itself, as settings."""

from pathlib import Path

from draftsmith.export.launch import Launch, python_launch, sglang_launch, vllm_launch
from draftsmith.export.llama_cpp.launch import llama_cpp_launch
from draftsmith.export.llama_cpp.targets import served_target
from draftsmith.export.openvino import check_options, openvino_launch
from draftsmith.export.source import ExportSource


def for_transformers(source: ExportSource, folder: Path) -> Launch:
    """Writes a generation config for transformers' prompt lookup."""
    config, settings = source.config, source.generation_config
    settings.update(prompt_lookup_num_tokens=config.num_draft, max_matching_ngram_size=config.max_ngram)
    settings.save_pretrained(folder)
    shorter = ("transformers also matches n-grams of a single token.",) if config.min_ngram > 1 else ()
    return python_launch(
        source,
        f"settings = GenerationConfig.from_pretrained({str(source.output)!r})",
        "model.generate(**inputs, generation_config=settings, max_new_tokens=64, do_sample=False)",
        notes=(*shorter, *_notes(source, "transformers"), "transformers drafts for a batch of one only."),
        prompt_lookup_num_tokens=config.num_draft,
        max_matching_ngram_size=config.max_ngram,
    )


def vllm(source: ExportSource, folder: Path) -> Launch:
    """Returns the settings of vLLM's n-gram lookup."""
    config = source.config
    settings = {"method": "ngram", "num_speculative_tokens": config.num_draft}
    settings |= {"prompt_lookup_max": config.max_ngram, "prompt_lookup_min": config.min_ngram}
    return vllm_launch(source, settings, notes=_notes(source, "vLLM"))


def sglang(source: ExportSource, folder: Path) -> Launch:
    """Returns the settings of SGLang's n-gram lookup, which searches the output of all requests."""
    config = source.config
    settings = {
        "algorithm": "NGRAM",
        "num-draft-tokens": config.num_draft + 1,
        "ngram-max-trie-depth": config.max_ngram + config.num_draft,
        "ngram-max-bfs-breadth": config.num_continuations,
    }
    return sglang_launch(source, settings)


def llama_cpp(source: ExportSource, folder: Path) -> Launch:
    """Returns the settings of llama.cpp's look-up of the latest match, beside the target's file."""
    if source.quantise:
        raise ValueError(f"--quantise is {source.quantise!r}, and a look-up has no weights; drop it")
    config, served = source.config, served_target(source)
    served.write(folder)
    settings = {"spec-ngram-simple-size-n": config.max_ngram, "spec-ngram-simple-size-m": config.num_draft}
    notes = (
        f"llama.cpp looks up the last {config.max_ngram} tokens only, and drafts nothing where fewer match; it does not"
        " draft from a match that ends within as many tokens of the end of the text.",
    )
    return llama_cpp_launch(served, "ngram-simple", settings, notes=notes)


def openvino(source: ExportSource, folder: Path) -> Launch:
    """Returns the settings of OpenVINO GenAI's look-up."""
    check_options(source)
    if source.quantise:
        raise ValueError(f"--quantise is {source.quantise!r}, and a look-up has no weights; drop it")
    config = source.config
    settings = {"prompt_lookup": True, "max_ngram_size": config.max_ngram, "num_assistant_tokens": config.num_draft}
    shorter = ("OpenVINO GenAI also matches n-grams of a single token.",) if config.min_ngram > 1 else ()
    return openvino_launch(source, settings, notes=(*shorter, *_notes(source, "OpenVINO GenAI")))


def _notes(source: ExportSource, engine: str) -> tuple[str, ...]:
    if source.config.earliest:
        return ()
    return (
        f"{engine} copies what followed the earliest match, up to the end of the text; this drafter copies the latest,"
        " so that it accepts another number of tokens. One made with --earliest is measured as the engine drafts.",
    )


WRITERS = {
    "transformers": for_transformers,
    "vllm": vllm,
    "sglang": sglang,
    "llama.cpp": llama_cpp,
    "openvino": openvino,
}
