"""draftsmith's thin inference module: one target, one loop, one artifact format, any drafter, the target's own law."""

from draftsmith.artifact import load, save
from draftsmith.hf import custom_generate
from draftsmith.loop import Generation, generate
from draftsmith.target import Target

__version__ = "0.1.0"
__all__ = ["Generation", "Target", "custom_generate", "generate", "load", "save"]
