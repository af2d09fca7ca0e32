"""Exports a datastore of text: a token-only drafter for vLLM, a corpus for SGLang, n-grams for llama.cpp."""

from draftsmith.export.llama_cpp.ngram_caches import cache_writer, contexts_of_texts
from draftsmith.export.tokens import corpus_writer, proposer_writer

WRITERS = {
    "vllm": proposer_writer(lambda config: config.num_draft),
    "sglang": corpus_writer(lambda config: config.num_draft),
    "llama.cpp": cache_writer(contexts_of_texts),
}
