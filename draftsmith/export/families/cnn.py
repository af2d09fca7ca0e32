"""A small convolutional model, which goes by tokens alone."""

from draftsmith.export.tokens import for_proposer

WRITERS = {"vllm": for_proposer(lambda config: config.num_draft)}
