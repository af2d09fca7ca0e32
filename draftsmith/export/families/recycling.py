"""Exports a matrix of successors, a token-only drafter that is not updated while vLLM runs it."""

from draftsmith.export.tokens import proposer_writer

WRITERS = {
    "vllm": proposer_writer(
        lambda config: max(map(len, config.tree)), "The matrix is not updated: vLLM passes no logits to the proposer."
    )
}
