"""Settings of a bake-off."""

from dataclasses import dataclass

from draftsmith import verify
from draftsmith.inputs.generation_config import parse_config
from draftsmith.length.controller import OWN, make_control


@dataclass(frozen=True, kw_only=True)
class BakeoffSettings:
    """Decoding settings of a bake-off, and its additional rows."""

    temperatures: tuple[float, ...] = (0.0, 1.0)
    """Sampling temperatures; 0 is greedy decoding."""
    batch_sizes: tuple[int, ...] = (1, 8)
    """Prompts per batch."""
    rounds: int = 3
    """Number of times that everything is decoded; speed-ups are medians over rounds."""
    max_new_tokens: int = 64
    """New tokens per prompt."""
    verifiers: tuple[str, ...] = ()
    """Verifiers to compare in extra rows of each drafter, in place of the default lossless one."""
    lengths: tuple[str, ...] = ()
    """Draft-length policies (draftsmith/length/policies.py) to compare in extra rows of each drafter."""
    confidence_thresholds: tuple[float, ...] = ()
    """Confidence thresholds on the target to compare in extra rows of each drafter; drafting is skipped below them."""
    forecast_sizes: tuple[int, ...] = (1, 2, 4, 8, 16)
    """Batch sizes for which speed-ups are predicted, beside the measured ones; empty for no predictions."""
    assisted: bool = False
    """Also time transformers' own speculative decoding: with each draft LM among the artifacts, and prompt look-up."""
    generation_config: str = ""
    """'model' applies the target's own generation config in every row, such as its repetition penalty; or JSON such as
    {"min_p": 0.1}, or a JSON file. Its temperature and lengths are not read: they are settings of their own."""
    continuous_batching: bool = False
    """Keep batches of more than one row full, as servers do: where a text ends, the next prompt takes its place. Else
    the rows of a batch begin together, and the batch runs until the last one ends."""
    batch_invariant: bool = False
    """Decode batch-invariantly, and sample by the verifier coupled: every drafter's text is plain decoding's. The
    target must have been made so."""
    seed: int = 0
    """Random seed of sampling."""
    threads: int = 1
    """CPU threads; 0 uses torch's default. A small target is fastest and most stable on one."""

    def __post_init__(self) -> None:
        parse_config(self.generation_config)
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
            if name != OWN:
                make_control(name)
        for threshold in self.confidence_thresholds:
            if not 0 < threshold < 1:
                raise ValueError(
                    f"confidence_thresholds are {list(self.confidence_thresholds)}; each must lie between 0 and 1"
                )

    def is_stream(self, batch_size: int) -> bool:
        """Returns whether batches of this size are kept full."""
        return self.continuous_batching and batch_size > 1

    def check_prompts(self, num_prompts: int) -> None:
        """Raises ValueError if there are too few prompts to fill the largest batch."""
        if num_prompts < max(self.batch_sizes):
            raise ValueError(f"batch size {max(self.batch_sizes)} needs as many prompts, but there are {num_prompts}")
