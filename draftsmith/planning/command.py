"""The command `draftsmith plan`: its arguments, their checks, and its steps."""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from draftsmith.planning.grid import Grid

MAX_LENGTH, MAX_BATCH, MAX_NUMBER = 64, 4096, 1_000_000
DEFAULT = Grid()


def add_arguments(parser: argparse.ArgumentParser, target_help: str, trust_help: str) -> None:
    """Adds the arguments of `draftsmith plan`."""
    parser.add_argument("artifact", help="a drafter's folder")
    parser.add_argument("--data", required=True, metavar="FILE", help="texts of the use: a text file, or JSON lines")
    parser.add_argument("--target", help=f"{target_help} (default: the artifact's target)")
    parser.add_argument("--output", metavar="OUT", help="the folder to write (default: ARTIFACT-plan)")
    parser.add_argument(
        "--batch-sizes",
        default=_listed(DEFAULT.batch_sizes),
        metavar="N,N",
        help="rows per batch (default %(default)s)",
    )
    parser.add_argument(
        "--contexts",
        metavar="N,N",
        help=f"tokens before the draft (default those of {_listed(DEFAULT.contexts)} that the target has room for)",
    )
    parser.add_argument(
        "--lengths", default="0..8", metavar="N..N", help="draft lengths to choose from (default %(default)s)"
    )
    for name, text in (
        ("num_texts", "texts per context in which acceptance is counted"),
        ("num_tokens", "tokens of each such text"),
        ("repeats", "timed rounds of each length, batch size and context"),
    ):
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, type=int, default=getattr(DEFAULT, name), metavar="N", help=f"{text} (%(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 decodes greedily (default 0)")
    parser.add_argument("--seed", type=int, default=0, help="seed of sampling (default 0)")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="CPU threads; 0 for torch's default")
    parser.add_argument("--dtype", default="auto", help="float32, bfloat16, ... (default: as stored)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, ... (default: cuda if available)")
    parser.add_argument("--trust-remote-code", action="store_true", help=trust_help)
    parser.set_defaults(run=run)


def numbers(flag: str, text: str, *, least: int, most: int) -> tuple[int, ...]:
    """Returns the numbers of "1,4,8" or "0..8", ascending; raises ValueError for anything else."""
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,7})(?:\.\.(\d{1,7}))?\s*", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if not least <= first <= last <= most:
            raise ValueError(
                f"{flag} is {text!r}; give whole numbers from {least} to {most:,}, as in 1,4,8 or {least}..8"
            )
        found += range(first, last + 1)
    return tuple(sorted(set(found)))


def grid_of(arguments: argparse.Namespace, context_length: int) -> Grid:
    """Returns what is to be measured; raises ValueError for an argument out of range, or contexts without room."""
    for name in ("num_texts", "num_tokens", "repeats"):
        if not 1 <= getattr(arguments, name) <= MAX_NUMBER:
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{flag} is {getattr(arguments, name)}; it must be from 1 to {MAX_NUMBER:,}")
    if not 0 <= arguments.temperature < float("inf"):
        raise ValueError(f"--temperature is {arguments.temperature}; it must be 0 or a positive number")
    if not 0 <= arguments.threads <= MAX_BATCH:
        raise ValueError(f"--threads is {arguments.threads}; it must be from 0 to {MAX_BATCH:,}")
    lengths = numbers("--lengths", arguments.lengths, least=0, most=MAX_LENGTH)
    if lengths == (0,):
        raise ValueError("--lengths is 0 alone, which is to draft nothing; give lengths to choose from, as in 0..8")
    sizes = numbers("--batch-sizes", arguments.batch_sizes, least=1, most=MAX_BATCH)
    given = arguments.contexts is not None
    asked = numbers("--contexts", arguments.contexts or _listed(DEFAULT.contexts), least=2, most=10**7 - 1)
    grid = Grid(
        batch_sizes=sizes,
        contexts=asked,
        lengths=tuple(sorted({0, *lengths})),
        num_texts=arguments.num_texts,
        num_tokens=arguments.num_tokens,
        repeats=arguments.repeats,
        temperature=arguments.temperature,
        seed=arguments.seed,
    )
    fitting = tuple(one for one in asked if one + grid.room <= context_length)
    if not fitting or (given and fitting != asked):
        raise ValueError(
            f"--contexts {_listed(asked)}: the target's context is {context_length:,} tokens, of which measuring takes"
            f" {grid.room:,}; contexts may have up to {max(context_length - grid.room, 0):,}, or more with fewer"
            " --lengths, --num-tokens or --repeats"
        )
    return Grid(**{**vars(grid), "contexts": fitting})


def run(arguments: argparse.Namespace) -> None:
    """Measures, prints the plan and writes its files."""
    from transformers.utils.logging import disable_progress_bar, enable_progress_bar, tqdm

    from draftsmith.artifacts.artifact import check_fits, load, read_manifest
    from draftsmith.artifacts.files import check_folder, check_replaceable
    from draftsmith.core.target import Target
    from draftsmith.length.costs import num_threads
    from draftsmith.loading.model_info import read_target_info
    from draftsmith.planning import engines, report
    from draftsmith.planning.contexts import contexts, read_texts
    from draftsmith.planning.lengths import Plan
    from draftsmith.planning.measure import measure

    manifest = read_manifest(arguments.artifact)
    path = arguments.target or manifest["target"]["name"]
    info = read_target_info(path)
    check_fits(arguments.artifact, manifest, info)
    if info.is_encoder_decoder:
        raise ValueError(
            f"target {path} is an encoder-decoder, and no engine drafts for those; plan for a causal model"
        )
    if info.tokenizer is None:
        raise ValueError(f"target {path} has no tokenizer; save one in its folder")
    grid = grid_of(arguments, info.context_length)
    output = Path(arguments.output or f"{Path(arguments.artifact).resolve()}-plan")
    check_folder(output)
    check_replaceable(output, marker=report.PLAN)
    texts = read_texts(arguments.data, info.tokenizer)
    contexts(texts, grid.contexts[-1], 1)
    disable_progress_bar()
    target = Target.from_pretrained(path, dtype=arguments.dtype, device=arguments.device)
    drafter = load(arguments.artifact, target)
    enable_progress_bar()
    target.check_batch(grid.batch_sizes[-1])
    with num_threads(arguments.threads), tqdm(total=grid.num_rounds, desc="Measuring", unit="round") as bar:
        measured = measure(
            drafter.target, drafter, lambda length, number: contexts(texts, length, number), grid, bar.update
        )
    plan = Plan(measured, grid)
    lengths = plan.by_batch_size()
    n_max, p_min, _ = plan.with_p_min()
    tables = engines.tables(lengths, n_max, p_min, has_p_min=plan.has_confidences)
    facts: dict[str, Any] = {
        "artifact": str(arguments.artifact),
        "family": manifest["family"],
        "target": str(path),
        "dtype": str(target.dtype).removeprefix("torch."),
        "device": str(target.device),
        "grid": vars(grid),
    }
    report.write(plan, tables, output, facts)
    print(f"Draft length by batch size, with the expected speed-up over plain decoding:\n\n{report.printed(plan)}\n")
    if plan.lengths[-1] < grid.lengths[-1]:
        print(f"The drafter drafts at most {plan.lengths[-1]} tokens; longer lengths are left out.\n")
    for table in tables:
        where = output / table.file if table.file else "no file"
        print(f"{table.engine}: {where}")
        for note in table.notes:
            print(f"  {note}")


def _listed(values: Sequence[int]) -> str:
    return ",".join(map(str, values))
