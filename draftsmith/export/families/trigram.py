"""Exports a table of trigrams, a token-only drafter for vLLM, an n-gram cache for llama.cpp."""

from draftsmith.export.llama_cpp.ngram_caches import cache_writer, contexts_of_trigrams
from draftsmith.export.tokens import proposer_writer

WRITERS = {
    "vllm": proposer_writer(lambda config: config.depth),
    "llama.cpp": cache_writer(contexts_of_trigrams),
}
