"""A datastore of text: tokens alone for vLLM, a corpus for SGLang."""

from draftsmith.export.tokens import for_corpus, for_proposer

WRITERS = {
    "vllm": for_proposer(lambda config: config.num_draft),
    "sglang": for_corpus(lambda config: config.num_draft),
}
