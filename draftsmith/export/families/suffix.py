"""Exports suffix trees of stored text: for vLLM a token-only drafter, for SGLang a corpus, for llama.cpp n-grams."""

from draftsmith.export.llama_cpp.ngram_caches import cache_writer, contexts_of_texts
from draftsmith.export.tokens import corpus_writer, proposer_writer

WRITERS = {
    "vllm": proposer_writer(lambda config: config.num_draft),
    "sglang": corpus_writer(lambda config: config.num_draft),
    "llama.cpp": cache_writer(contexts_of_texts),
}
