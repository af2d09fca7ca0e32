"""Exports an n-gram model, a token-only drafter for vLLM, an n-gram cache for llama.cpp."""

from draftsmith.export.llama_cpp.ngram_caches import cache_writer, contexts_of_ngram_model
from draftsmith.export.tokens import proposer_writer

WRITERS = {
    "vllm": proposer_writer(lambda config: config.num_draft),
    "llama.cpp": cache_writer(contexts_of_ngram_model),
}
