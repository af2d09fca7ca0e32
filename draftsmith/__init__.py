"""draftsmith's inference module: lossless speculative decoding of one target with any family of drafter."""

from draftsmith.artifacts.artifact import load, save
from draftsmith.core.target import Target
from draftsmith.decoding import Generation, generate, generate_stream
from draftsmith.hf import custom_generate
from draftsmith.inputs.outputs import StreamedText

__version__ = "0.1.0"
__all__ = [
    "Generation",
    "StreamedText",
    "Target",
    "custom_generate",
    "generate",
    "generate_stream",
    "load",
    "save",
]
