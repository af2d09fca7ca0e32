"""Exports a datastore of text: a token-only drafter for vLLM, a corpus for SGLang."""

from draftsmith.export.tokens import corpus_writer, proposer_writer

WRITERS = {
    "vllm": proposer_writer(lambda config: config.num_draft),
    "sglang": corpus_writer(lambda config: config.num_draft),
}
