"""A matrix of successors, which goes by tokens alone where it learns nothing more."""

from draftsmith.export.tokens import for_proposer

WRITERS = {
    "vllm": for_proposer(
        lambda config: max(map(len, config.tree)), "The matrix stays as it is: vLLM shows no logits to learn from."
    )
}
