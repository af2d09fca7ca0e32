"""draftsmith's thin inference module: one target, one loop, one artifact format, any drafter, the target's own law."""

from draftsmith.loop import Generation, generate
from draftsmith.target import Target

__all__ = ["Generation", "Target", "generate"]
