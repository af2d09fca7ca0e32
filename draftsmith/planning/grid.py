"""What a plan measures: batch sizes, contexts and draft lengths, and how often."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Grid:
    """What is measured."""

    batch_sizes: tuple[int, ...] = (1, 4, 8, 16)
    """Rows per batch, ascending."""
    contexts: tuple[int, ...] = (128, 512, 1024)
    """Tokens before the drafts, ascending."""
    lengths: tuple[int, ...] = tuple(range(9))
    """Draft lengths, ascending, 0 first."""
    num_texts: int = 32
    """Texts per context in which acceptance is counted."""
    num_tokens: int = 64
    """Positions per text at which it is counted."""
    repeats: int = 5
    """Timed rounds of each length, batch size and context."""
    temperature: float = 0.0
    seed: int = 0

    @property
    def room(self) -> int:
        """Returns the most tokens that a run writes after its context."""
        longest = self.lengths[-1]
        return self.num_tokens + longest + (self.repeats + 1) * sum(length + 1 for length in self.lengths) + 1

    @property
    def num_batches(self) -> int:
        """Returns the number of batches that acceptance is counted in, for each context."""
        return -(-self.num_texts // self.batch_sizes[-1])

    @property
    def num_rounds(self) -> int:
        """Returns the number of rounds of the whole measurement."""
        timed = (self.repeats + 1) * len(self.lengths) * len(self.batch_sizes)
        return len(self.contexts) * (timed + self.num_batches * (self.num_tokens + self.lengths[-1]))
