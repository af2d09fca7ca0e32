"""The target with whole blocks left out, as a model of its own: a draft model for any server."""

from typing import Any

from draftsmith.export.given import Given
from draftsmith.export.models import cut, for_draft_model, for_standalone

OWN_CACHE = (
    "It reads keys and values of its own where draftsmith's drafts read the target's, and may be right less often."
)


def draft_model(given: Given) -> Any:
    """Returns it; raises ValueError where a block is left out in part, or none is."""
    config = given.config
    left_out = set(config.attention)
    if left_out != set(config.mlp):
        part = sorted(left_out ^ set(config.mlp))
        raise ValueError(
            f"blocks {part} are left out in part, which no ordinary model can be; run it with draftsmith, or export it"
            " --to transformers as a custom_generate folder"
        )
    if not left_out:
        raise ValueError("nothing is left out, so that drafting would take as long as the target; search a mask first")
    return cut(given.drafter.target, [block for block in range(given.facts.num_layers) if block not in left_out])


WRITERS = {"vllm": for_draft_model(draft_model, OWN_CACHE), "sglang": for_standalone(draft_model, OWN_CACHE)}
