"""The command `draftsmith`: generate text with a drafter; inspect, export, describe or publish an artifact."""

import argparse
import difflib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

CHECKOUT_TARGET = Path(__file__).parent.parent / "data" / "pocket"
GREEN_UNDERLINED, PLAIN = "\033[4;32m", "\033[0m"


class _Parser(argparse.ArgumentParser):
    """A parser that names the nearest flag when it meets one that it does not know."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            chosen = self._subparsers._group_actions[0].choices[parsed.command]  # type: ignore[union-attr,index]
            flags = [flag for action in chosen._actions for flag in action.option_strings]
            near = difflib.get_close_matches(unknown[0].split("=")[0], flags, n=1, cutoff=0.5)
            self.error(f"unknown argument {unknown[0]!r}; " + (f"did you mean {near[0]}?" if near else "see --help"))
        return parsed

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"draftsmith: {message}\n")


def main(argv: list[str] | None = None) -> None:
    """Runs the command line; a user's mistake ends in one sentence on stderr and exit status 2."""
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except ValueError as error:
        sys.exit(_fail(str(error)))
    except KeyboardInterrupt:
        sys.exit(130)


def _fail(message: str) -> int:
    print(f"draftsmith: {message}", file=sys.stderr)
    return 2


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="draftsmith", description="Speculative decoding with drafters made by draftsmith.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{generate,inspect,export,card,push}")
    generate = commands.add_parser("generate", help="continue a prompt, streaming", allow_abbrev=False)
    generate.add_argument("prompt", help="the text to continue; - reads standard input")
    generate.add_argument("--target", help="a transformers folder or hub name (default: the pocket target)")
    generate.add_argument("--draft", metavar="ARTIFACT", help="a drafter's folder; without it decoding is plain")
    generate.add_argument("--show-drafts", action="store_true", help="mark the tokens that the drafter got right")
    generate.add_argument(
        "--max-new-tokens", type=int, default=128, metavar="N", help="at most this many (default 128)"
    )
    generate.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0, the default, is greedy")
    generate.add_argument("--top-p", type=float, default=1.0, metavar="P", help="keep this mass of likeliest tokens")
    generate.add_argument("--top-k", type=int, default=0, metavar="K", help="keep this many tokens; 0 keeps all")
    generate.add_argument("--seed", type=int, help="the same seed gives the same text")
    generate.add_argument("--verifier", default="auto", help="how drafts are judged (default: the best lossless way)")
    generate.add_argument(
        "--length", default="auto", help="how much is drafted, as fixed=4 (default: the drafter's own)"
    )
    generate.add_argument("--dtype", default="auto", help="float32, bfloat16, ... (default: as stored)")
    generate.add_argument("--device", default="auto", help="cpu, cuda, ... (default: cuda where there is one)")
    generate.set_defaults(run=_generate)
    inspect = commands.add_parser("inspect", help="show what an artifact is and how it measured", allow_abbrev=False)
    inspect.add_argument("artifact", help="a drafter's folder, or owner/name on the hub")
    inspect.set_defaults(run=_inspect)
    export = commands.add_parser("export", help="write an artifact as a server loads it", allow_abbrev=False)
    export.add_argument("artifact", help="a drafter's folder")
    export.add_argument("--to", required=True, metavar="ENGINE", help="transformers, vllm, sglang or speculators")
    export.add_argument("--target", help="a transformers folder or hub name (default: what the artifact was made for)")
    export.add_argument("output", metavar="OUT", help="the folder to write")
    export.set_defaults(run=_export)
    card = commands.add_parser("card", help="write an artifact's README.md anew", allow_abbrev=False)
    card.add_argument("artifact", help="a drafter's folder")
    card.add_argument("--results", metavar="BAKEOFF_JSON", help="a comparison whose figures the card is to show")
    card.set_defaults(run=_card)
    push = commands.add_parser("push", help="upload an artifact to the Hugging Face hub", allow_abbrev=False)
    push.add_argument("artifact", help="a drafter's folder")
    push.add_argument("repo_id", metavar="OWNER/NAME", help="the repository, made if it is not there")
    push.add_argument("--private", action="store_true", help="make it a private one")
    push.set_defaults(run=_push)
    return parser


def _generate(arguments: argparse.Namespace) -> None:
    # Imported late, so that --help and mistakes in flags answer at once.
    from transformers.utils.logging import disable_progress_bar

    from draftsmith import Target, load, verify
    from draftsmith.artifacts.artifact import check_fits, read_manifest
    from draftsmith.core.batching import check_lengths
    from draftsmith.core.model_info import read_target_info
    from draftsmith.core.sampling import Sampling
    from draftsmith.decoding import generate
    from draftsmith.length import policies

    disable_progress_bar()
    Sampling(temperature=arguments.temperature, top_p=arguments.top_p, top_k=arguments.top_k)
    if arguments.verifier != "auto":
        verify.find(arguments.verifier)
    if arguments.length != "auto":
        policies.make(arguments.length)
    if arguments.target is None and not CHECKOUT_TARGET.is_dir():
        raise ValueError("name a target with --target: a transformers folder or hub name")
    path = arguments.target or str(CHECKOUT_TARGET)
    facts = read_target_info(path)
    if facts.tokenizer is None:
        raise ValueError(f"target {path} has no tokenizer; save one in its folder")
    if arguments.draft is not None:
        check_fits(arguments.draft, read_manifest(arguments.draft), facts)
    prompt = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
    prompt_ids = facts.tokenizer(prompt, return_tensors="pt", verbose=False)["input_ids"].long()
    if prompt_ids.shape[1] == 0:
        raise ValueError("the prompt is empty; give some text to continue")
    check_lengths(facts, prompt_ids.tolist(), arguments.max_new_tokens)
    target = Target.from_pretrained(path, dtype=arguments.dtype, device=arguments.device)
    drafter = load(arguments.draft, target) if arguments.draft is not None else None
    if drafter is not None and drafter.target is not target:
        print("draftsmith: this drafter has tuned its target, whose text may differ from the target's", file=sys.stderr)
        target = drafter.target
    printer = _Printer(target.tokenizer, marks=arguments.show_drafts and drafter is not None)
    began = time.perf_counter()
    out = generate(
        target,
        prompt_ids.to(target.device),
        drafter,
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        top_k=arguments.top_k,
        seed=arguments.seed,
        verifier=arguments.verifier,
        length=arguments.length,
        streamer=printer,
    )
    seconds = time.perf_counter() - began
    stats = out.stats
    print(
        f"{stats.new_tokens} tokens in {seconds:.2f} s ({stats.new_tokens / seconds:.0f}/s),"
        f" {stats.tau:.2f} tokens a target forward; draft {stats.draft_ms:.0f} ms, verify {stats.verify_ms:.0f} ms",
        file=sys.stderr,
    )


class _Printer:
    """Streams text as tokens come; with `marks` the drafter's accepted tokens are underlined or bracketed."""

    def __init__(self, tokenizer: Any, *, marks: bool, write: Callable[[str], Any] | None = None) -> None:
        self._tokenizer, self._marks, self._write = tokenizer, marks, write or sys.stdout.write
        colours = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        self._open, self._close = (GREEN_UNDERLINED, PLAIN) if colours else ("[", "]")
        self._ids: list[int] = []
        self._num_printed = 0
        self._is_prompt = True

    def put(self, tokens: Any) -> None:
        """Prints one step's tokens: the last one is the target's own, those before it were drafted."""
        ids = tokens.tolist()
        drafted, own = (ids[:-1], ids[-1:]) if self._marks and not self._is_prompt else ([], ids)
        self._print(drafted, self._open, self._close)
        self._print(own, "", "")
        self._is_prompt = False
        sys.stdout.flush()

    def end(self) -> None:
        """Ends the text with a line break."""
        self._write("\n")

    def _print(self, ids: list[int], before: str, after: str) -> None:
        self._ids += ids
        text = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        # A character whose bytes have not all come decodes to a replacement mark; it is held back.
        fresh = text[self._num_printed :].rstrip("\ufffd")
        if fresh:
            self._write(f"{before}{fresh}{after}")
            self._num_printed += len(fresh)


def _inspect(arguments: argparse.Namespace) -> None:
    from draftsmith.artifacts.artifact import family_of, local_folder, read_manifest
    from draftsmith.artifacts.model_card import num_parameters

    folder = local_folder(arguments.artifact)
    manifest = read_manifest(folder)
    tuned = ", which it tunes" if manifest.get("tunes_target") else ""
    print(f"{folder}: a drafter of family {manifest['family']} for target {manifest['target']['name']}{tuned}")
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        print(f"  {file.stat().st_size / 1e6:8.2f} MB  {file.relative_to(folder)}")
    if (folder / "model.safetensors").is_file():
        print(f"  {num_parameters(folder / 'model.safetensors'):,} parameters")
    for key, value in manifest.items():
        print(f"{key}: {value if isinstance(value, str) else json.dumps(value)}")
    try:
        family_of(manifest, folder)
    except ValueError as error:
        print(f"draftsmith: {error}", file=sys.stderr)


def _card(arguments: argparse.Namespace) -> None:
    from draftsmith.artifacts.artifact import read_manifest
    from draftsmith.artifacts.model_card import CARD, measured_section, read_rows, rewrite

    folder = Path(arguments.artifact)
    manifest, measured = read_manifest(folder), ""
    if arguments.results is not None:
        name, parent = folder.resolve().name, folder.resolve().parent.name
        measured = measured_section(read_rows(Path(arguments.results)), (name, f"{parent}/{name}"), manifest["family"])
    kept = rewrite(folder, manifest, measured)
    print(f"Written: {folder / CARD}" + (f"; the one before, written by hand, is now {kept}" if kept else ""))


def _push(arguments: argparse.Namespace) -> None:
    from draftsmith.artifacts import hub
    from draftsmith.artifacts.artifact import own_files, read_manifest
    from draftsmith.artifacts.model_card import CARD, for_hub

    folder = Path(arguments.artifact)
    manifest = read_manifest(folder)
    if "files" not in manifest:
        raise ValueError(f"the manifest of {folder} does not say which files are its own; save it anew to push it")
    hub.check_may_push(folder)
    files: dict[str, str | Path] = {str(file.relative_to(folder)): file for file in own_files(folder)}
    files[CARD] = for_hub(folder, manifest, arguments.repo_id)
    print(hub.push(folder, files, arguments.repo_id, private=arguments.private))


def _export(arguments: argparse.Namespace) -> None:
    from draftsmith.export import export
    from draftsmith.export.launch import read_launch

    folder = export(arguments.artifact, arguments.to, arguments.output, arguments.target)
    launch = read_launch(folder)
    print(f"{folder}: {launch['artifact']['family']} for {launch['checked_with']}")
    for note in launch["notes"]:
        print(f"  {note}")
    print(f"\n{launch['command']}")
