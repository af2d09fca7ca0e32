"""The command line `draftsmith`: generates text with a drafter, plans draft lengths, inspects, exports, pushes."""

import argparse
import difflib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from draftsmith.artifacts import files
from draftsmith.loading import remote_code
from draftsmith.planning import command as planning

CHECKOUT_TARGET = Path(__file__).parent.parent / "data" / "pocket"
TARGET_HELP = "a transformers folder, GGUF file, named target such as smollm2, or hub name"
TRUST_HELP = "let the target run the Python code in its folder (default: no such code is run)"
GREEN_UNDERLINED, PLAIN = "\033[4;32m", "\033[0m"


class _Parser(argparse.ArgumentParser):
    """A parser whose error for an unknown flag names the nearest one."""

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
    """Runs the command line; a user error prints one sentence on stderr and exits with status 2."""
    arguments = _parser().parse_args(argv)
    if getattr(arguments, "trust_remote_code", False):
        remote_code.allow()
    try:
        arguments.run(arguments)
        sys.stdout.flush()
    except ValueError as error:
        sys.exit(_fail(str(error)))
    except BrokenPipeError:
        files.end_quietly()
    except OSError as error:
        sys.exit(_fail(files.system_fault(error)))
    except KeyboardInterrupt:
        sys.exit(130)


def _fail(message: str) -> int:
    print(f"draftsmith: {message}", file=sys.stderr)
    return 2


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="draftsmith", description="Speculative decoding with drafters made by draftsmith.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{generate,plan,inspect,export,card,push}")
    generate = commands.add_parser("generate", help="continue a prompt and stream the text", allow_abbrev=False)
    generate.add_argument("prompt", help="the text to continue; - reads standard input")
    generate.add_argument("--target", help=f"{TARGET_HELP} (default: the pocket target)")
    generate.add_argument("--draft", metavar="ARTIFACT", help="a drafter's folder (default: plain decoding)")
    generate.add_argument("--show-drafts", action="store_true", help="mark the accepted draft tokens")
    generate.add_argument(
        "--max-new-tokens", type=int, default=128, metavar="N", help="most tokens generated (default 128)"
    )
    generate.add_argument("--temperature", type=float, metavar="T", help="0 decodes greedily (default 0)")
    generate.add_argument(
        "--top-p",
        type=float,
        metavar="P",
        help="keep the most likely tokens up to this probability (default 1)",
    )
    generate.add_argument(
        "--top-k",
        type=int,
        metavar="K",
        help="keep this many of the most likely tokens; 0 keeps all (default 0)",
    )
    generate.add_argument(
        "--generation-config",
        default="",
        metavar="CONFIG",
        help="'model' applies the model's own, such as its repetition penalty and temperature; or JSON, or a JSON file;"
        " other flags take precedence (default: none)",
    )
    generate.add_argument("--stop", action="append", metavar="TEXT", help="stop after this text; may be repeated")
    generate.add_argument("--seed", type=int, help="the same seed gives the same text")
    generate.add_argument(
        "--verifier",
        default="auto",
        help="how drafts are verified; coupled: the same --seed gives the same text with every drafter and with none"
        " (default: the best lossless verifier)",
    )
    generate.add_argument(
        "--length", default="auto", help="draft-length policy, such as fixed=4 (default: the drafter's own)"
    )
    generate.add_argument(
        "--batch-invariant",
        action="store_true",
        help="the same text with every drafter and with none, in any precision",
    )
    generate.add_argument("--dtype", default="auto", help="float32, bfloat16, ... (default: as stored)")
    generate.add_argument("--device", default="auto", help="cpu, cuda, ... (default: cuda if available)")
    generate.add_argument("--trust-remote-code", action="store_true", help=TRUST_HELP)
    generate.set_defaults(run=_generate)
    plan = commands.add_parser(
        "plan", help="measure which draft lengths pay at which load, and write engines' tables", allow_abbrev=False
    )
    planning.add_arguments(plan, TARGET_HELP, TRUST_HELP)
    inspect = commands.add_parser("inspect", help="show an artifact's manifest and sizes", allow_abbrev=False)
    inspect.add_argument("artifact", help="a drafter's folder, or owner/name on the hub")
    inspect.set_defaults(run=_inspect)
    export = commands.add_parser("export", help="write an artifact in a server's format", allow_abbrev=False)
    export.add_argument("artifact", help="a drafter's folder")
    export.add_argument(
        "--to", required=True, metavar="ENGINE", help="transformers, vllm, sglang, speculators, llama.cpp or openvino"
    )
    export.add_argument("--target", help=f"{TARGET_HELP} (default: the artifact's target)")
    export.add_argument(
        "--target-name",
        default="",
        metavar="NAME",
        help="the target where speculators will run: its folder or hub name (default: the hub name, or relative to"
        " OUT); for llama.cpp, a GGUF file of the target to use as it is, for openvino its converted folder",
    )
    export.add_argument(
        "--quantise",
        default="",
        metavar="TYPE",
        help="type of the drafter's matrices: for llama.cpp q8_0, q4_0, ... (default: the target's dtype), for openvino"
        " fp32, fp16, int8, int4 (default: fp32)",
    )
    export.add_argument(
        "--quantise-target",
        default="",
        metavar="TYPE",
        help="write the target in this type for llama.cpp (default: the GGUF file that it is from, or its dtype), or"
        " convert it to this type for openvino (default: fp32)",
    )
    export.add_argument("output", metavar="OUT", help="the folder to write")
    export.add_argument("--trust-remote-code", action="store_true", help=TRUST_HELP)
    export.set_defaults(run=_export)
    card = commands.add_parser("card", help="rewrite an artifact's model card, README.md", allow_abbrev=False)
    card.add_argument("artifact", help="a drafter's folder")
    card.add_argument("--results", metavar="BAKEOFF_JSON", help="a comparison whose results the card shows")
    card.set_defaults(run=_card)
    push = commands.add_parser("push", help="upload an artifact to the Hugging Face hub", allow_abbrev=False)
    push.add_argument("artifact", help="a drafter's folder")
    push.add_argument("repo_id", metavar="OWNER/NAME", help="the repository, created if missing")
    push.add_argument("--private", action="store_true", help="create it as private")
    push.set_defaults(run=_push)
    return parser


def _generate(arguments: argparse.Namespace) -> None:
    # Imported here, so that --help and errors in flags are printed without delay.
    from transformers.utils.logging import disable_progress_bar

    from draftsmith import Target, load, verify
    from draftsmith.artifacts.artifact import check_fits, read_manifest
    from draftsmith.decoding import generate
    from draftsmith.inputs.batching import check_lengths
    from draftsmith.inputs.generation_config import parse_config, with_sampling
    from draftsmith.inputs.texts import encode_text
    from draftsmith.length.controller import make_control
    from draftsmith.loading.model_info import read_target_info

    disable_progress_bar()
    with_sampling(None, arguments.temperature, arguments.top_p, arguments.top_k)
    config = parse_config(arguments.generation_config)
    if arguments.verifier != "auto":
        verify.find(arguments.verifier)
    if arguments.length != "auto":
        make_control(arguments.length)
    if arguments.target is None and not CHECKOUT_TARGET.is_dir():
        raise ValueError(f"no target: name one with --target, {TARGET_HELP}")
    path = arguments.target or str(CHECKOUT_TARGET)
    info = read_target_info(path)
    if info.tokenizer is None:
        raise ValueError(f"target {path} has no tokenizer; save one in its folder")
    if arguments.draft is not None:
        check_fits(arguments.draft, read_manifest(arguments.draft), info)
    prompt = _standard_input() if arguments.prompt == "-" else arguments.prompt
    prompt_ids = encode_text(info.tokenizer, prompt)
    if not prompt_ids:
        raise ValueError("the prompt is empty; pass a text to continue")
    check_lengths(info, [prompt_ids], arguments.max_new_tokens)
    target = Target.from_pretrained(path, dtype=arguments.dtype, device=arguments.device)
    drafter = load(arguments.draft, target) if arguments.draft is not None else None
    if drafter is not None and drafter.target is not target:
        print(
            "draftsmith: this drafter fine-tunes its target, whose text may differ from the original", file=sys.stderr
        )
        target = drafter.target
    printer = _Printer(target.tokenizer, marks=arguments.show_drafts and drafter is not None)
    began = time.perf_counter()
    out = generate(
        target,
        [prompt_ids],
        drafter,
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        top_k=arguments.top_k,
        generation_config=config,
        stop_strings=arguments.stop,
        seed=arguments.seed,
        verifier=arguments.verifier,
        length=arguments.length,
        streamer=printer,
        batch_invariant=arguments.batch_invariant,
    )
    seconds = time.perf_counter() - began
    stats = out.stats
    print(
        f"{stats.new_tokens} tokens in {seconds:.2f} s ({stats.new_tokens / seconds:.0f}/s),"
        f" mean accepted length (tau) {stats.tau:.2f}; draft {stats.draft_ms:.0f} ms, verify {stats.verify_ms:.0f} ms",
        file=sys.stderr,
    )


def _standard_input() -> str:
    if sys.stdin is None:
        raise ValueError("standard input is closed; pass the prompt as an argument, or through a pipe")
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise ValueError(f"standard input is not UTF-8 text (byte {error.start})") from None


class _Printer:
    """Streams text; with `marks` accepted draft tokens are underlined, or bracketed without colours."""

    def __init__(self, tokenizer: Any, *, marks: bool, write: Callable[[str], Any] | None = None) -> None:
        self._tokenizer, self._marks, self._write = tokenizer, marks, write or sys.stdout.write
        colours = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        self._open, self._close = (GREEN_UNDERLINED, PLAIN) if colours else ("[", "]")
        self._ids: list[int] = []
        self._num_printed = 0
        self._is_prompt = True

    def put(self, tokens: Any) -> None:
        """Prints one step's tokens: accepted draft tokens, then the target's own."""
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
        # An incomplete character decodes to a replacement character, which is held back.
        new = text[self._num_printed :].rstrip("\ufffd")
        if new:
            self._write(f"{before}{new}{after}")
            self._num_printed += len(new)


def _inspect(arguments: argparse.Namespace) -> None:
    from draftsmith.artifacts.artifact import family_of, faults_of, local_folder, read_manifest
    from draftsmith.artifacts.model_card import num_parameters

    folder = local_folder(arguments.artifact)
    manifest = read_manifest(folder)
    note = ", which it fine-tunes" if manifest.get("tunes_target") else ""
    print(f"{folder}: a drafter of family {manifest['family']} for target {manifest['target']['name']}{note}")
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
        return
    faults = list(faults_of(folder))
    for fault in faults:
        print(f"draftsmith: fault: {fault}", file=sys.stderr)
    if faults:
        sys.exit(1)


def _card(arguments: argparse.Namespace) -> None:
    from draftsmith.artifacts.artifact import read_manifest
    from draftsmith.artifacts.model_card import CARD, measured_section, read_rows, rewrite

    folder = Path(arguments.artifact)
    manifest, measured = read_manifest(folder), ""
    if arguments.results is not None:
        name, parent = folder.resolve().name, folder.resolve().parent.name
        measured = measured_section(read_rows(Path(arguments.results)), (name, f"{parent}/{name}"), manifest["family"])
    kept = rewrite(folder, manifest, measured)
    print(f"Written: {folder / CARD}" + (f"; the edited card is kept as {kept}" if kept else ""))


def _push(arguments: argparse.Namespace) -> None:
    from draftsmith.artifacts import hub
    from draftsmith.artifacts.artifact import own_files, read_manifest
    from draftsmith.artifacts.model_card import CARD, for_hub

    folder = Path(arguments.artifact)
    manifest = read_manifest(folder)
    if "files" not in manifest:
        raise ValueError(f"the manifest of {folder} does not list the artifact's files; save it again to push it")
    hub.check_may_push(folder)
    files: dict[str, str | Path] = {str(file.relative_to(folder)): file for file in own_files(folder)}
    files[CARD] = for_hub(folder, manifest, arguments.repo_id)
    print(hub.push(folder, files, arguments.repo_id, private=arguments.private))


def _export(arguments: argparse.Namespace) -> None:
    from draftsmith.export import export
    from draftsmith.export.launch import read_launch

    folder = export(
        arguments.artifact,
        arguments.to,
        arguments.output,
        arguments.target,
        arguments.target_name,
        quantise=arguments.quantise,
        quantise_target=arguments.quantise_target,
    )
    launch = read_launch(folder)
    print(f"{folder}: {launch['artifact']['family']} for {launch['checked_with']}")
    for note in launch["notes"]:
        print(f"  {note}")
    if "convert" in launch:
        print(f"\nFirst convert it, in an environment with optimum-intel:\n\n{launch['convert']}\n\nThen run it:")
    print(f"\n{launch['command']}")
    if "python" in launch:
        print(f"\nThe same in Python:\n\n{launch['python']}")
