"""Certifies that drafters are lossless: greedy text equals the target's, sampled text has its distribution.

    ./launch.sh lossless --draft runs/medusa                        # pocket target, held-out source, into runs/lossless
    ./launch.sh lossless --target T --data prompts.jsonl --draft runs/mine runs/other --num-rows 8000
    ./launch.sh lossless --draft runs/medusa --verifier coupled      # sampled text equals plain decoding's, by seed
    ./launch.sh lossless --draft runs/medusa --verifier coupled --batch-invariant --dtypes bfloat16    # to the bit
    ./launch.sh lossless --draft runs/distill --verifier typical    # a lossy verifier: tested, but not certified

eval/lossless.py says what is tested and which biases are detected; `python -m eval.lossless` is the same command. The
exit status is 1 unless all tests passed. Pocket target, one drafter, one CPU core: 3 minutes and 20 seconds.
"""

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

from data import POCKET
from data.prompts import LongPrompts, TextSettings, load_prompts, prompt_room
from data.sources import default_source
from draftsmith import Target
from draftsmith.artifacts.artifact import check_fits, read_manifest
from draftsmith.loading.model_info import read_target_info
from eval.certificate.identity import GreedySettings
from eval.certificate.sampled import EXTRA_TOKENS, SampledTestSettings
from eval.lossless import LOSSLESS, certify, check_output, lines, save
from trainers.training import launchers
from trainers.training.settings import parse_settings


@dataclass(frozen=True, kw_only=True)
class LosslessSettings:
    """The artifacts to certify, and the prompts."""

    target: str = str(POCKET)
    """A transformers folder, GGUF file, named target (smollm2, pocket) or hub name."""
    draft: tuple[str, ...] = ()
    """Folders of the artifacts to certify."""
    data: str = ""
    """Source of the prompts (data/sources); if empty, python-source, or python-docstrings for an encoder-decoder."""
    text: TextSettings = field(default_factory=TextSettings)
    """Settings for reading rows of text."""
    output: str = "runs/lossless"
    """Folder for lossless.json and lossless.md."""
    num_prompts: int = 8
    """Number of prompts."""
    max_steps: int = 0
    """Maximum number of sampled batches per drafter and sampling setting, for a quick trial; 0 for all."""
    prompt_tokens: int = 32
    """Length of prompts cut from source code or plain text, in tokens."""
    long_prompts: LongPrompts = "auto"
    """Treatment of prompts too long for the target; auto truncates an encoder's input, and raises for others."""
    batch_invariant: bool = False
    """Decode batch-invariantly: texts and the bits of their logits must be plain decoding's, also in bfloat16."""
    device: str = "auto"
    """Device of the target."""

    def __post_init__(self) -> None:
        if not self.draft:
            raise ValueError("--draft names no artifact; name at least one to certify")
        if len(set(self.draft)) < len(self.draft):
            raise ValueError(f"drafts are {list(self.draft)}; name each artifact once")


def main(run: LosslessSettings, settings: SampledTestSettings, greedy: GreedySettings) -> int:
    """Returns the exit status."""
    output = Path(run.output)
    check_output(output)
    manifests = [read_manifest(draft) for draft in run.draft]
    target_info = read_target_info(run.target)
    for draft, manifest in zip(run.draft, manifests, strict=True):
        check_fits(draft, manifest, target_info)
    if run.max_steps:
        num_rows = min(settings.num_rows, run.max_steps * settings.rows_at_once)
        settings = replace(settings, num_rows=num_rows)
    prompts = load_prompts(
        run.data or default_source("", is_encoder_decoder=target_info.is_encoder_decoder),
        target_info.tokenizer,
        max_prompts=run.num_prompts,
        max_prompt_tokens=prompt_room(target_info, max(greedy.max_new_tokens, settings.num_tokens + EXTRA_TOKENS)),
        prompt_tokens=run.prompt_tokens,
        long_prompts=run.long_prompts,
        is_encoder_decoder=target_info.is_encoder_decoder,
        settings=run.text,
        seed=settings.seed,
    )
    greedy.check_prompts(len(prompts))
    certificate = certify(
        lambda dtype: Target.from_pretrained(
            run.target, dtype=dtype, device=run.device, batch_invariant=run.batch_invariant
        ),
        [Path(draft) for draft in run.draft],
        prompts,
        settings,
        greedy,
    )
    save(certificate, output)
    print("\n".join(lines(certificate, "terminal")))
    print(f"\nWritten to {output}: lossless.json and lossless.md")
    return 0 if certificate["verdict"] == LOSSLESS else 1


if __name__ == "__main__":
    with launchers.user_errors():
        sys.exit(main(*parse_settings(LosslessSettings, SampledTestSettings, GreedySettings, description=__doc__)))
