"""Exports an n-gram model, a token-only drafter."""

from draftsmith.export.tokens import proposer_writer

WRITERS = {"vllm": proposer_writer(lambda config: config.num_draft)}
