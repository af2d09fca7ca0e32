"""Looks why a drafter accepts less than it did in training: position by position, and by checks that name the cause.

    ./launch.sh doctor --draft runs/medusa                       # the target and the data that it was trained with
    ./launch.sh doctor --draft runs/mine --target T --data runs/mine-data --num-prompts 32
    ./launch.sh doctor --draft runs/medusa --vllm-python .venv-serving/bin/python

The target continues held-out prompts greedily. Drafts begun afresh at every place of these texts are what training
promises; beside them stand real decoding, for a draft model transformers' assisted generation, and if asked vLLM,
which runs the artifact's export. Then come checks of the chat template, the loss mask, hidden layers, rotary positions,
vocabulary map, dtype, positions and export. The status is 1 if a fault was found.
Pocket target, one CPU core: a minute.
"""

import dataclasses
import importlib.util
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from eval.doctor.run_assisted import assistant_of, run_assisted
from tqdm import tqdm

import draftsmith
from data.batches import Example, collate, example, split
from data.examples import check_target, open_examples
from data.shards import write_whole
from data.teacher import complete
from draftsmith import Target
from draftsmith.artifacts.artifact import check_fits, make_config, read_manifest
from draftsmith.core.model_info import read_target_info
from draftsmith.export import export
from draftsmith.export.launch import read_launch
from draftsmith.length.costs import num_threads
from eval.bakeoff.measure import DecodingRequest, draftsmith_method
from eval.doctor import checks
from eval.doctor.checks import CheckContext, Finding
from eval.doctor.serving import check_python, drafts_trees, run_draftsmith, run_vllm
from eval.doctor.teacher_forced import DraftCounts, GreedyText, draft_from_positions, draft_positions
from eval.report.recorded_texts import greedy_steps
from trainers.training.evaluation import MetricSums
from trainers.training.settings import parse_settings

FIRST_RIGHT = ("head0_accuracy", "greedy_agreement")
"""What trainers call how often the first token is right."""


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Who is looked at, on what, and how closely."""

    draft: str
    """Folder of the artifact."""
    target: str = ""
    """A transformers folder or hub name, if empty the one that the artifact was made for."""
    data: str = ""
    """What it learnt from, if empty what its manifest says: a folder of pseudo-data, a store, or any source of text."""
    output: str = "runs/doctor"
    """Folder for doctor.json."""
    num_prompts: int = 16
    """Held-out rows whose prompts are continued."""
    max_new_tokens: int = 48
    """Tokens written after each."""
    num_places: int = 1024
    """Places at most where drafts are begun afresh."""
    depth: int = 8
    """Most tokens of a draft."""
    threads: int = 1
    """CPU threads, 0 for torch's own choice."""
    device: str = "auto"
    """Where the target runs."""
    dtype: str = ""
    """What the target's weights are loaded as, if empty as in training."""
    vllm_python: str = ""
    """A Python that has vLLM, as .venv-serving/bin/python once ./launch.sh serving-test was run: what vLLM accepts is
    looked at too."""

    def __post_init__(self) -> None:
        for name in ("num_prompts", "max_new_tokens", "num_places", "depth"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")


def main(run: RunSettings) -> int:
    """Returns the process's status."""
    if run.vllm_python:
        check_python(run.vllm_python)
    manifest = read_manifest(run.draft)
    settings = manifest.get("settings") or {}
    name, source = run.target or manifest["target"]["name"], run.data or settings.get("data")
    if not source:
        raise ValueError(f"artifact {run.draft} does not say what it learnt from; name texts with --data")
    facts = read_target_info(name)
    if facts.is_encoder_decoder:
        raise ValueError(f"target {name} is an encoder-decoder; the doctor looks at drafters of causal targets")
    check_fits(run.draft, manifest, facts)
    examples = open_examples(source, facts)
    dtype = run.dtype or (manifest.get("made_with") or {}).get("dtype") or "float32"
    target = Target.from_pretrained(name, dtype=dtype, device=run.device)
    check_target(examples, source, target)
    drafter = draftsmith.load(run.draft, target)
    share, seed = settings.get("held_out_share", 0.05), settings.get("seed", 0)
    _, held_out = split(examples.keys, held_out_share=share, seed=seed)
    rows = [examples[index] for index in held_out[: run.num_prompts]]
    with num_threads(run.threads):
        report = examine(run, manifest, drafter, rows, examples.manifest)
    Path(run.output).mkdir(parents=True, exist_ok=True)
    write_whole(Path(run.output) / "doctor.json", lambda path: path.write_text(json.dumps(report, indent=1) + "\n"))
    print("\n".join(lines(report)))
    return int(any(finding["verdict"] == "fault" for finding in report["findings"]))


def examine(
    run: RunSettings, manifest: dict[str, Any], drafter: Any, rows: list[Example], data: dict[str, Any] | None
) -> dict[str, Any]:
    """Returns acceptance position by position, and what each check found."""
    target = drafter.target
    texts = _texts(target, rows, run)
    findings = [
        checks.check_template(manifest, data, target.tokenizer),
        checks.check_mask(rows, target, data),
        checks.check_dtype(Path(run.draft), manifest, target),
        checks.check_vocabulary(drafter, texts),
    ]
    columns: dict[str, DraftCounts] = {}
    judged: dict[str, float] = {}
    if findings[-1].verdict != "fault":  # with a map that leads astray there may be no drafting at all
        places = draft_positions(texts, run.num_places)
        with tqdm(total=len(places), desc="drafts begun afresh", unit="draft", leave=False, delay=2) as bar:
            teacher_forced = draft_from_positions(target, drafter, texts, places, run.depth, on_progress=bar.update)
        carried, began = _decoded(drafter, texts, run)
        afresh = draft_from_positions(target, drafter, texts, began, run.depth)
        columns = {"begun everywhere": teacher_forced, "begun where decoding did": afresh, "in decoding": carried}
        assistant = assistant_of(drafter)
        if assistant is not None:
            prompts = [text.ids[: text.num_prompt] for text in texts]
            columns["by transformers"], _ = run_assisted(target, assistant, prompts, run.depth, run.max_new_tokens)
        judged = _judged(manifest, drafter, texts, run)
        first_right = next((judged[name] for name in FIRST_RIGHT if name in judged), None)
        patient = CheckContext(
            manifest=manifest,
            drafter=drafter,
            texts=texts,
            places=places,
            depth=run.depth,
            teacher_forced=teacher_forced,
        )
        findings += [
            checks.check_layers(patient),
            checks.check_rotary(patient),
            checks.check_position(patient, first_right),
            checks.check_carried(patient, afresh, carried),
        ]
        if run.vllm_python:
            finding, counts = _served(drafter, texts, run)
            findings.append(finding)
            columns |= counts
    return {
        "draft": run.draft,
        "target": target.name,
        "recorded": manifest.get("measured_acceptance"),
        "judged": judged,
        "accepted_per_depth": {name: counts.shares() for name, counts in columns.items()},
        "num_drafts": {name: counts.num_drafts for name, counts in columns.items()},
        "findings": [dataclasses.asdict(finding) for finding in findings],
    }


def lines(report: dict[str, Any]) -> list[str]:
    """Returns the report for a terminal."""
    deepest = max(map(len, report["accepted_per_depth"].values()), default=0)
    found = ["", f"% of drafts accepted to depth{'':9}" + "".join(f"{depth:>6}" for depth in range(1, deepest + 1))]
    for name, shares in report["accepted_per_depth"].items():
        number = f"({report['num_drafts'][name]:,})"
        found.append(f"{name:<26}{number:>10}" + "".join(f"{100 * share:6.1f}" for share in shares))
    for what, metrics in (("recorded in training", report["recorded"]), ("judged on these texts", report["judged"])):
        if metrics:
            found.append(f"{what}: " + ", ".join(f"{name} {value:.3f}" for name, value in metrics.items()))
    found.append("")
    return found + [f"{one['verdict']:<10}{one['name']:<15}{one['told']}" for one in report["findings"]]


def _texts(target: Target, rows: list[Example], run: RunSettings) -> list[GreedyText]:
    """Returns the rows' prompts, or first halves where all is supervised, with what the target writes after them."""
    prompts = []
    for row in rows:
        first = int(row.loss_mask_T.long().argmax())
        ids = row.tokens_T[: first if first > 1 else max(2, len(row.tokens_T) // 2)].tolist()
        prompts.append(ids[-(target.context_length - run.max_new_tokens) :])
    ask = DecodingRequest(prompts=prompts, temperature=0.0, max_new_tokens=run.max_new_tokens, seed=0)
    written = draftsmith_method(target)(ask).rows
    return [
        GreedyText(ids=prompt + text, num_prompt=len(prompt))
        for prompt, text in zip(prompts, written, strict=True)
        if text
    ]


def _decoded(drafter: Any, texts: list[GreedyText], run: RunSettings) -> tuple[DraftCounts, list[tuple[int, int]]]:
    """Returns what real decoding accepts, and where its drafts began: (text, length of what stands before)."""
    counts, began = DraftCounts(), []
    for number, text in enumerate(tqdm(texts, desc="decoding", unit="text", leave=False, delay=2)):
        end = text.num_prompt
        for step in greedy_steps(drafter, text.ids[:end], run.max_new_tokens, length=f"fixed={run.depth}"):
            if step.drafted:
                counts.add(min(max(map(len, step.drafted)), len(text.ids) - end), len(step.path))
                began.append((number, end))
            end += len(step.path) + (step.target_token is not None)
    return counts, began


def _served(drafter: Any, texts: list[GreedyText], run: RunSettings) -> tuple[Finding, dict[str, DraftCounts]]:
    """Returns how vLLM does with the artifact's export, beside draftsmith's loop drafting as much."""
    prompts = [text.ids[: text.num_prompt] for text in texts]
    with tempfile.TemporaryDirectory() as folder:
        try:
            launch = read_launch(export(run.draft, "vllm", Path(folder) / "out", drafter.target.name))
        except ValueError as error:
            return Finding(name="export", verdict="not known", told=str(error)), {}
        num_draft = launch["settings"]["num_speculative_tokens"]
        found = run_vllm(run.vllm_python, drafter.target, prompts, run.max_new_tokens, Path(folder) / "run", launch)
    own = run_draftsmith(drafter, prompts, run.max_new_tokens, num_draft)
    is_tree = drafts_trees(drafter, prompts[0], run.max_new_tokens, num_draft)
    counts = {
        name: DraftCounts(
            drafted=[one.num_drafts] * len(one.accepted), accepted=one.accepted, num_drafts=one.num_drafts
        )
        for name, one in (("by vLLM", found), (f"in decoding, drafts of {num_draft}", own))
    }
    return checks.check_export(found, own, is_tree=is_tree), counts


def _judged(manifest: dict[str, Any], drafter: Any, texts: list[GreedyText], run: RunSettings) -> dict[str, float]:
    """Returns the trainer's judgement of the texts, nothing if the artifact does not say how it was trained."""
    kept, name = manifest.get("settings"), f"trainers.{manifest.get('trainer', manifest['family'])}"
    if not kept or importlib.util.find_spec(name) is None:
        return {}
    family = importlib.import_module(name)
    own = {field.name for field in dataclasses.fields(family.Settings)}
    settings = make_config(family.Settings, {name: kept[name] for name in kept if name in own}, run.draft)
    base = drafter.target.base
    needs, sums = family.needs(settings, base), MetricSums()
    for text in texts:
        mask = [place >= text.num_prompt for place in range(len(text.ids))]
        batch = collate([example(text.ids, mask, "text")])
        batch = complete(batch, base, needs.layers + needs.held_out_layers, needs.top_k)
        with torch.no_grad():
            sums.add(family.evaluate(drafter, batch, settings, base))
    return sums.means()


if __name__ == "__main__":
    try:
        sys.exit(main(*parse_settings(RunSettings, description=__doc__)))
    except ValueError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
