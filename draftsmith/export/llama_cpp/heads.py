"""What heads on the target's hidden states have in common in llama.cpp: which targets and layers it reads."""

from torch import nn

from draftsmith.export.llama_cpp.models import READS_HIDDEN, READS_LAST
from draftsmith.export.llama_cpp.targets import ServedTarget


def check_hidden(served: ServedTarget, layers: tuple[int, ...], num_layers: int) -> None:
    """Raises ValueError if llama.cpp does not give these hidden layers of the target to a drafter.

    Layers are numbered as draftsmith does, which is as llama.cpp does: the input of block k is hidden layer k.
    """
    if served.architecture not in READS_HIDDEN:
        known = ", ".join(sorted(READS_HIDDEN))
        raise ValueError(
            f"llama.cpp gives drafters no hidden states of {served.architecture!r} targets, only of {known}; export a"
            " draft model (./launch.sh distill) instead, or run the head with draftsmith or another engine"
        )
    if layers[-1] == num_layers and served.architecture not in READS_LAST:
        raise ValueError(
            f"the head reads hidden layers {list(layers)}, and of {served.architecture!r} targets llama.cpp does not"
            f" give the last, {num_layers}; train a head on layers below it"
        )


def is_plain_embedding(embedding: nn.Module) -> bool:
    """Returns whether tokens are embedded by rows of a matrix alone, without a scale, as llama.cpp's heads do."""
    return type(embedding) is nn.Embedding
