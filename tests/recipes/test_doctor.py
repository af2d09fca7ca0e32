"""Tests of the doctor: sound drafters pass every check, and each fault planted in artifact, data or target is found.

The target's text is a cycle of tokens: each depends on the last one alone, so that perfect drafters can be constructed.
"""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import draftsmith
from data.prompts import TextSettings
from data.pseudo_data import MARKER
from draftsmith import Target
from draftsmith.artifacts.families import find
from eval.doctor.assisted import run_assisted
from eval.doctor.checks import CheckContext, check_export, check_position
from eval.doctor.serving import ServingCounts
from eval.doctor.teacher_forced import GreedyText, draft_from_positions, draft_positions
from recipes import doctor
from recipes.doctor import DoctorSettings
from tests.support.models import (
    VOCAB_SIZE,
    greedy_by_transformers,
    prompts,
    scramble,
    tiny_model,
    tiny_target,
    tiny_tokenizer,
)
from tests.support.runs import make_data, trainer_settings
from trainers import distill, eagle3, lookup, medusa
from trainers.training.loop import train
from trainers.training.run_settings import RunSettings
from trainers.training.settings import flat, parse_settings

FIRST, STRIDE = 3, 7
NEW_TOKENS = 16
NAMES = ("eagle3", "medusa", "distill", "lookup")


def successor(token: int, steps: int = 1) -> int:
    """Returns the token `steps` after `token` in the cycle of all tokens but the special ones."""
    return FIRST + (token - FIRST + steps * STRIDE) % (VOCAB_SIZE - FIRST)


@torch.no_grad()
def set_head(head_VD: Tensor, states_VD: Tensor, steps: int) -> None:
    """Sets an LM head that maps each token's normed state to the token `steps` after it."""
    head_VD.zero_()
    for token in range(FIRST, VOCAB_SIZE):
        head_VD[successor(token, steps)] = states_VD[token]


@torch.no_grad()
def make_cyclic(folder: Path) -> Target:
    """Saves a target without attention, with random blocks and a head that continues the cycle."""
    model = tiny_model("llama", seed=14)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.zero_()
    model.model.layers[2].mlp.down_proj.weight *= 20  # makes the last block's output unlike the others'
    model.model.norm.weight.fill_(1)
    set_head(model.lm_head.weight, model.model(torch.arange(VOCAB_SIZE)[:, None]).last_hidden_state[:, 0], 1)
    model.save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    return Target.from_pretrained(str(folder), dtype="float32")


@torch.no_grad()
def drafters(target: Target) -> dict[str, tuple[Any, Any]]:
    """Returns drafters that are correct as far as possible, with settings as of their training."""
    layers = target.read(torch.arange(VOCAB_SIZE)[:, None], layers=(2, 3))
    fused = trainer_settings(eagle3, layers=(1, 2), draft_vocab=48, num_draft=1, width=0)
    first = eagle3.build(fused, target)
    first.set_vocabulary(torch.arange(10, 58))
    for weight in (first.attention.output.weight, first.feed_forward.down.weight, first.fusion.weight):
        weight.zero_()
    first.fusion.weight[:, 32:] = torch.eye(32)
    head_VD = torch.zeros(VOCAB_SIZE, 32)
    set_head(head_VD, first.norm(layers[2][:, 0]), 2)
    first.head.weight.copy_(head_VD[10:58])

    heads = trainer_settings(medusa, num_heads=2, own_head=True)
    second = medusa.build(heads, target)
    for number, output in enumerate(second.outputs):
        set_head(output.weight, target.norm(layers[3])[:, 0], 2 + number)

    small = trainer_settings(distill, num_draft=3, length="fixed")
    family = find("lm")
    third = family.Drafter(family.Config(model=target.model.config.to_dict(), num_draft=3, length="fixed"), target)
    third.model.load_state_dict(target.model.state_dict())
    return {"eagle3": (first, fused), "medusa": (second, heads), "distill": (third, small)}


@pytest.fixture(scope="module")
def sound_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with the target, its greedy text, and drafters as if trained on it; lookup really is."""
    folder = tmp_path_factory.mktemp("doctor")
    target = make_cyclic(folder / "target")
    data = make_data(target, folder / "data", num_rows=40, max_new_tokens=NEW_TOKENS, temperature="0")
    given = {"target": str(folder / "target"), "data": str(data), "held_out_share": 0.2}
    for name, (drafter, settings) in drafters(target).items():
        record = {"trainer": name, "settings": flat(settings) | given | {"seed": 0}}
        draftsmith.save(drafter, folder / name, target=target, record=record)
    train(lookup, lookup.Settings(), RunSettings(output=str(folder / "lookup"), batch_size=4, **given))  # type: ignore
    return folder


@pytest.fixture
def faulty_folder(sound_folder: Path, tmp_path: Path) -> Path:
    """Returns a copy of that folder to plant faults in; its manifests name the copy."""
    shutil.copytree(sound_folder, tmp_path / "copy")
    for name in NAMES:
        file = tmp_path / "copy" / name / "draft_config.json"
        file.write_text(file.read_text().replace(str(sound_folder), str(tmp_path / "copy")))
    return tmp_path / "copy"


def examine(folder: Path, name: str, **given: Any) -> tuple[int, dict[str, Any]]:
    """Returns the doctor's exit status and report."""
    settings = {"draft": str(folder / name), "output": str(folder / "report"), "max_new_tokens": NEW_TOKENS, "depth": 3}
    status = doctor.main(DoctorSettings(**settings | {"num_prompts": 6} | given))  # type: ignore[arg-type]
    return status, json.loads((folder / "report" / "doctor.json").read_text())


def faults(report: dict[str, Any]) -> dict[str, str]:
    return {one["name"]: one["message"] for one in report["findings"] if one["verdict"] == "fault"}


def change(file: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    held = json.loads(file.read_text())
    edit(held)
    file.write_text(json.dumps(held))


@pytest.mark.parametrize("name", NAMES)
def test_doctor_passes_sound_drafters(sound_folder: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, report = examine(sound_folder, name)
    assert status == 0 and not faults(report)
    found = {one["name"]: one["verdict"] for one in report["findings"]}
    assert len(found) == 9 and "unknown" not in found.values()
    shares, drafts = report["accepted_per_depth"], report["num_drafts"]
    assert shares[doctor.DECODING] == shares[doctor.DECODING_POSITIONS]
    assert drafts[doctor.ALL_POSITIONS] == 6 * NEW_TOKENS
    if name == "distill":
        assert shares[doctor.ALL_POSITIONS] == shares[doctor.DECODING] == [1.0] * 3
    if name == "medusa":  # its first draft after a prompt, which is not of the cycle, is wrong
        num_positions = 6 * NEW_TOKENS
        assert shares[doctor.ALL_POSITIONS] == pytest.approx([1 - 6 / num_positions, 1 - 6 / (num_positions - 6)])
    if name == "eagle3":
        assert report["evaluated"]["head0_accuracy"] == pytest.approx(shares[doctor.ALL_POSITIONS][0])
        assert 0.5 < shares[doctor.ALL_POSITIONS][0] < 1
    assert ("assisted, transformers" in shares) == (name == "distill")
    if name == "distill":
        assert shares["assisted, transformers"] == [1.0] * 3 and drafts["assisted, transformers"] == 6 * (
            NEW_TOKENS // 4 - 1
        )
    output = capsys.readouterr().out
    assert "% of drafts accepted to depth" in output and "ok       template" in output and "fault" not in output


def test_doctor_reads_text_with_the_templates_arguments_of_training(
    faulty_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Any] = []

    def open_examples(*given: Any, settings: TextSettings) -> Any:
        found.append(settings)
        return doctor_open_examples(*given, settings=settings)

    doctor_open_examples = doctor.open_examples
    monkeypatch.setattr(doctor, "open_examples", open_examples)
    rows = [{"text": "one of several words"}, {"text": "one"}]
    (faulty_folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recorded, own = {"mood": "calm"}, {"mood": "glad"}
    change(
        faulty_folder / "medusa" / "draft_config.json",
        lambda held: held["settings"].update(chat_template_kwargs=recorded),
    )
    for given, expected in (({}, recorded), (own, own)):
        text = TextSettings(chat_template_kwargs=given, max_left_out=0.2)
        with pytest.raises(ValueError, match=r"1 of 2 rows cannot be used .*rows.jsonl:2: it has nothing to learn"):
            examine(faulty_folder, "medusa", data=str(faulty_folder / "rows.jsonl"), text=text)
        assert found[-1].chat_template_kwargs == expected
    (settings,) = parse_settings(
        DoctorSettings,
        description="",
        argv=["--draft", "d", "--max-left-out", "0.3", "--chat-template-kwargs", "{a: 1}"],
    )
    assert settings.text == TextSettings(max_left_out=0.3, chat_template_kwargs={"a": 1})


# A planted fault is found; its further effects on acceptance may be reported too.


def test_check_template_changed_in_the_tokenizer(faulty_folder: Path) -> None:
    file = faulty_folder / "target" / "chat_template.jinja"
    assert file.is_file()
    file.write_text("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}")
    status, report = examine(faulty_folder, "medusa")
    assert status == 1
    assert faults(report) == {
        "template": "the artifact and its data were made with a chat template other than the tokenizer's present one"
    }


def test_check_template_of_the_data_differs(faulty_folder: Path) -> None:
    change(faulty_folder / "data" / MARKER, lambda held: held.update(template_hash="0" * 32))
    _, report = examine(faulty_folder, "medusa")
    assert list(faults(report)) == ["template"] and faults(report)["template"].startswith("its data was made")


def test_check_mask_covers_the_prompt(faulty_folder: Path) -> None:
    for file in (faulty_folder / "data").glob("*.parquet"):
        table = pyarrow.parquet.read_table(file)
        column = table.schema.get_field_index("num_prompt_tokens")
        fewer = pyarrow.array([max(1, number.as_py() - 1) for number in table["num_prompt_tokens"]], pyarrow.int32())
        pyarrow.parquet.write_table(table.set_column(column, table.schema.field(column), fewer), file)
    _, report = examine(faulty_folder, "medusa")
    assert list(faults(report)) == ["mask"]
    assert "the mask covers tokens that the target did not generate" in faults(report)["mask"]


def test_check_layers_off_by_one(faulty_folder: Path) -> None:
    change(faulty_folder / "eagle3" / "draft_config.json", lambda held: held["config"].update(layers=[2, 3]))
    _, report = examine(faulty_folder, "eagle3")
    assert "with layers 2, 3" in faults(report)["layers"] and "layers one lower" in faults(report)["layers"]


def test_check_layers_of_another_index(faulty_folder: Path) -> None:
    change(faulty_folder / "eagle3" / "draft_config.json", lambda held: held.update(layer_index="blocks count from 0"))
    _, report = examine(faulty_folder, "eagle3")
    assert list(faults(report)) == ["layers"] and "blocks count from 0" in faults(report)["layers"]


def test_check_rotary_of_the_target_changed(faulty_folder: Path) -> None:
    change(faulty_folder / "target" / "config.json", lambda held: held["rope_parameters"].update(rope_theta=500_000.0))
    _, report = examine(faulty_folder, "medusa")
    assert "10000" in faults(report)["rotary"] and "500000" in faults(report)["rotary"]


def test_check_rotary_base_of_the_drafter_changed(tmp_path: Path) -> None:
    """A copy of a target with attention is accurate with the target's own base only."""
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "target")
    tiny_tokenizer().save_pretrained(tmp_path / "target")
    target = Target.from_pretrained(str(tmp_path / "target"), dtype="float32")
    make_data(target, tmp_path / "data", num_rows=40, max_new_tokens=NEW_TOKENS, temperature="0")
    drafter, settings = drafters(target)["distill"]
    record = {"trainer": "distill", "settings": flat(settings) | {"data": str(tmp_path / "data"), "seed": 0}}
    draftsmith.save(drafter, tmp_path / "distill", target=target, record=record)
    assert not faults(examine(tmp_path, "distill")[1])
    file = tmp_path / "distill" / "draft_config.json"
    change(file, lambda held: held["config"]["model"]["rope_parameters"].update(rope_theta=2.0))
    _, report = examine(tmp_path, "distill")
    assert list(faults(report)) == ["rotary"]
    assert "first-token accuracy with base 2, 100% with 10000" in faults(report)["rotary"]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda d2t: d2t + torch.arange(len(d2t)), "leaves the vocabulary or is not ascending"),
        (lambda d2t: d2t + 1, "d2t and t2d differ in 2 tokens"),
    ],
)
def test_check_vocabulary_of_an_inconsistent_map(
    faulty_folder: Path, edit: Callable[[Tensor], Tensor], message: str
) -> None:
    file = faulty_folder / "eagle3" / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"d2t": edit(tensors["d2t"])}, file)
    status, report = examine(faulty_folder, "eagle3")
    assert status == 1 and list(faults(report)) == ["vocabulary"] and message in faults(report)["vocabulary"]
    assert report["accepted_per_depth"] == {}


def test_check_dtype(faulty_folder: Path) -> None:
    _, report = examine(faulty_folder, "medusa", dtype="bfloat16")
    assert faults(report)["dtype"] == "the target was in float32 in training and is in bfloat16"
    file = faulty_folder / "medusa" / "model.safetensors"
    tensors = load_file(file)
    save_file({name: tensor.half() for name, tensor in tensors.items()}, file)
    assert "stored in float16" in faults(examine(faulty_folder, "medusa")[1])["dtype"]
    name = next(name for name in tensors if name.startswith("outputs.1"))
    save_file(tensors | {name: torch.full_like(tensors[name], torch.nan)}, file)
    with pytest.raises(ValueError, match=f"tensor {name} is not finite"):
        examine(faulty_folder, "medusa")


def test_check_position_shifted_by_one(faulty_folder: Path) -> None:
    file = faulty_folder / "medusa" / "model.safetensors"
    tensors = load_file(file)
    swapped = {
        name.replace(".0.", ".x.").replace(".1.", ".0.").replace(".x.", ".1.")
        if name.startswith("outputs")
        else name: one
        for name, one in tensors.items()
    }
    assert swapped.keys() == tensors.keys()
    save_file(swapped, file)
    _, report = examine(faulty_folder, "medusa")
    assert "against tokens 1 later: drafts are shifted" in faults(report)["position"]


def test_check_state_not_carried_over(sound_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A drafter whose `observe` does nothing drafts from its first state."""
    monkeypatch.setattr(find("medusa").Drafter, "observe", lambda self, step: None)
    _, report = examine(sound_folder, "medusa")
    assert "the state carried from step to step is wrong" in faults(report)["carried state"]


def test_check_position_differs_from_the_trainers_accuracy() -> None:
    target = tiny_target("llama")
    drafter = distill_copy(target)
    texts = [GreedyText(ids=ids, num_prompt=len(ids) - 12) for ids in greedy_by_transformers("llama", 3, 12)]
    positions = draft_positions(texts, 10**6)
    teacher_forced = draft_from_positions(target, drafter, texts, positions, 2)
    assert teacher_forced.rates() == [1.0, 1.0] and (teacher_forced.drafted, teacher_forced.num_drafts) == (
        [36, 33],
        36,
    )
    context = CheckContext(
        manifest={}, drafter=drafter, texts=texts, positions=positions, depth=2, teacher_forced=teacher_forced
    )
    assert check_position(context, 1.0).verdict == check_position(context, None).verdict == "ok"
    found = check_position(context, 0.9)
    assert found.verdict == "fault" and "first-token accuracy 100.0% in drafts, 90.0%" in found.message


def distill_copy(target: Target) -> Any:
    family = find("lm")
    drafter = family.Drafter(family.Config(model=target.model.config.to_dict(), num_draft=3, length="fixed"), target)
    drafter.model.load_state_dict(target.model.state_dict())
    return drafter


def test_draft_positions_are_evenly_spaced() -> None:
    texts = [GreedyText(ids=[0] * 6, num_prompt=2), GreedyText(ids=[0] * 4, num_prompt=1)]
    assert draft_positions(texts, 100) == [(0, 2), (0, 3), (0, 4), (0, 5), (1, 1), (1, 2), (1, 3)]
    assert draft_positions(texts, 3) == [(0, 2), (0, 5), (1, 3)]


def test_run_assisted_counts_equal_draftsmiths() -> None:
    """Counts agree draft by draft for a partly correct model, whose generation config is restored."""
    target = tiny_target("llama")
    drafter = distill_copy(target)
    torch.manual_seed(0)
    scramble(drafter.model, seed=3)
    with torch.no_grad():
        for mine, theirs in zip(drafter.model.parameters(), target.model.parameters(), strict=True):
            mine.copy_(0.15 * mine + theirs)
    before = drafter.model.generation_config
    selected = [ids for ids in prompts(4) if len(ids) > 1]
    counts, texts = run_assisted(target, drafter.model, selected, 3, 21)
    assert drafter.model.generation_config is before
    expected = [
        row for ids, row in zip(prompts(4), greedy_by_transformers("llama", 4, 21), strict=True) if len(ids) > 1
    ]
    assert texts == [row[len(ids) :] for ids, row in zip(selected, expected, strict=True)]
    drafted, accepted, num_drafts = [0] * 3, [0] * 3, 0
    for ids in selected:
        for step in doctor.greedy_steps(drafter, ids, 21, length="fixed=3")[:-1]:
            num_drafts += 1
            for depth in range(3):
                drafted[depth] += max(map(len, step.drafted)) > depth
                accepted[depth] += len(step.path) > depth
    assert 0.1 < accepted[0] / drafted[0] < 0.95
    assert (counts.num_drafts, counts.accepted) == (num_drafts, accepted)


def test_doctor_invalid_input_raises(sound_folder: Path, tmp_path: Path) -> None:
    target = Target.from_pretrained(str(sound_folder / "target"), dtype="float32")
    family = find("lookup")
    draftsmith.save(family.Drafter(family.Config(), target), tmp_path / "bare", target=target)
    with pytest.raises(ValueError, match="does not record its training data; name texts with --data"):
        doctor.main(DoctorSettings(draft=str(tmp_path / "bare"), output=str(tmp_path / "out")))
    with pytest.raises(ValueError, match="depth is 0"):
        DoctorSettings(draft="x", depth=0)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("path", "names the file '../secret'"),
        ("number", "has the number NaN, which is not finite"),
        ("weights", "is not finite"),
        ("missing", "tensor .* is missing"),
    ],
)
def test_doctor_names_faults_of_files(faulty_folder: Path, fault: str, message: str) -> None:
    file, weights = (faulty_folder / "medusa" / name for name in ("draft_config.json", "model.safetensors"))
    if fault == "path":
        change(file, lambda manifest: manifest["files"].append("../secret"))
    elif fault == "number":
        change(file, lambda manifest: manifest["config"].update(num_heads=float("nan")))
    else:
        tensors = load_file(weights)
        name = min(tensors)
        tensor = tensors.pop(name)
        save_file(tensors if fault == "missing" else tensors | {name: tensor * float("nan")}, weights)
    with pytest.raises(ValueError, match=message) as error:
        examine(faulty_folder, "medusa")
    assert "\n" not in str(error.value)


def test_check_numbers_of_weights_that_are_too_large(faulty_folder: Path) -> None:
    """Finite weights, so that the artifact loads, whose products overflow."""
    weights = faulty_folder / "medusa" / "model.safetensors"
    save_file({name: torch.full_like(tensor, 1e38) for name, tensor in load_file(weights).items()}, weights)
    status, report = examine(faulty_folder, "medusa", num_prompts=2)
    assert status == 1
    assert "the drafter's module outputs.0 puts out NaN or infinite numbers" in faults(report)["numbers"]


def test_checks_of_missing_records_are_unknown(faulty_folder: Path) -> None:
    file = faulty_folder / "medusa" / "draft_config.json"
    change(file, lambda held: [held.pop(key) for key in ("made_with", "trainer")])
    change(faulty_folder / "data" / MARKER, lambda held: held.pop("template_hash"))
    status, report = examine(faulty_folder, "medusa")
    unknown = {one["name"] for one in report["findings"] if one["verdict"] == "unknown"}
    assert status == 0 and {"template", "dtype", "rotary"} <= unknown


def test_doctor_invalid_vllm_python_raises(sound_folder: Path) -> None:
    with pytest.raises(ValueError, match="nowhere/python cannot be run as a Python interpreter"):
        examine(sound_folder, "lookup", vllm_python="nowhere/python")
    with pytest.raises(ValueError, match="lacks vllm or draftsmith; use .venv-serving/bin/python, made by"):
        examine(sound_folder, "lookup", vllm_python=sys.executable)


def serving_counts(*accepted: int) -> ServingCounts:
    return ServingCounts(texts=[[3, 4]], num_drafts=40, num_drafted=80, accepted=list(accepted))


@pytest.mark.parametrize(
    ("accepted", "is_tree", "verdict"),
    [((30, 20), False, "ok"), ((20, 9), False, "fault"), ((30,), False, "fault"), ((20, 9), True, "unknown")],
)
def test_check_export(accepted: tuple[int, ...], is_tree: bool, verdict: str) -> None:
    finding = check_export(serving_counts(*accepted), serving_counts(30, 21), is_tree=is_tree)
    assert finding.verdict == verdict and f"vLLM accepts {sum(accepted) / 40:.2f} tokens per draft" in finding.message
