"""How much a comparison decodes, and under which laws."""

from dataclasses import dataclass

from draftsmith import verify
from draftsmith.length import policies


@dataclass(frozen=True, kw_only=True)
class BakeoffSettings:
    """How much is decoded, and under which laws."""

    temperatures: tuple[float, ...] = (0.0, 1.0)
    """0 is greedy."""
    batch_sizes: tuple[int, ...] = (1, 8)
    """Prompts decoded at once."""
    rounds: int = 3
    """Times that everything is decoded; speed-ups are medians over rounds."""
    max_new_tokens: int = 64
    """After each prompt."""
    verifiers: tuple[str, ...] = ()
    """Further rows for each drafter, with these verifiers in place of the default lossless ones."""
    lengths: tuple[str, ...] = ()
    """Further rows for each drafter, with these policies of draftsmith/length/policies.py in place of its own."""
    gates: tuple[float, ...] = ()
    """Further rows for each drafter, which drafts nothing where the target is less confident than this."""
    forecast_sizes: tuple[int, ...] = (1, 2, 4, 8, 16)
    """Batch sizes for which speed-ups are predicted, beside those that are measured; empty for no predictions."""
    seed: int = 0
    """Of what is sampled."""
    threads: int = 1
    """CPU threads, 0 for torch's own choice; a small target is fastest and steadiest on one."""

    def __post_init__(self) -> None:
        for name in ("rounds", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not self.temperatures or not all(0 <= t < float("inf") for t in self.temperatures):
            raise ValueError(f"temperatures are {list(self.temperatures)}; each must be 0 or a positive number")
        if not self.batch_sizes or min(self.batch_sizes) < 1:
            raise ValueError(f"batch sizes are {list(self.batch_sizes)}; each must be at least 1")
        if self.threads < 0:
            raise ValueError(f"threads is {self.threads}; it must be 0 or more")
        if self.forecast_sizes and min(self.forecast_sizes) < 1:
            raise ValueError(f"forecast_sizes are {list(self.forecast_sizes)}; each must be at least 1")
        for name in self.verifiers:
            verify.find(name)
        for name in self.lengths:
            policies.make(name)
        for threshold in self.gates:
            if not 0 < threshold < 1:
                raise ValueError(f"gates are {list(self.gates)}; each must lie between 0 and 1")

    def check_prompts(self, num_prompts: int) -> None:
        """Raises ValueError if there are too few for a batch."""
        if num_prompts < max(self.batch_sizes):
            raise ValueError(f"batch size {max(self.batch_sizes)} needs as many prompts, and there are {num_prompts}")
