"""Exports for transformers, run by transformers, and what all exports share: errors, launch.json, the command."""

import ast
import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GenerationConfig,
    TextIteratorStreamer,
    dynamic_module_utils,
)

import draftsmith
from draftsmith import Target, hf
from draftsmith.artifacts.families import find, names
from draftsmith.cli import main
from draftsmith.drafters import early_exit, layerskip, lm, lookup
from draftsmith.export import ENGINES, export, writers
from draftsmith.export.launch import LAUNCH, read_launch
from tests.support.family import built
from tests.support.models import NUM_LAYERS, VOCAB_SIZE, padded, prompts, tiny_model, tiny_tokenizer

NUM_NEW = 12
ARCHITECTURES = ("llama", "qwen2", "gemma3_text", "gpt2")
FAMILIES_WITHOUT_SERVER = (
    "hydra",
    "kangaroo",
    "prophet",
    "merge",
    "cascade",
    "staged",
    "translated",
    "lookahead",
    "medusa2",
)


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny targets and their tokenizers, in subfolders named after the architectures."""
    root = tmp_path_factory.mktemp("export")
    for architecture in (*ARCHITECTURES, "t5"):
        model = tiny_model(architecture)
        model.generation_config.pad_token_id = 0
        model.save_pretrained(root / architecture)
        tiny_tokenizer().save_pretrained(root / architecture)
    return root


@pytest.fixture(autouse=True)
def _own_module_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))


def target_of(root: Path, architecture: str = "llama") -> Target:
    return Target.from_pretrained(str(root / architecture), dtype="float32")


def artifact_of(drafter: Any, folder: Path) -> Path:
    draftsmith.save(drafter, folder, drafter.target.base)
    return folder


def example(family: str, target: Target) -> Any:
    return built(find(family), importlib.import_module(f"tests.drafters.test_{family}").EXAMPLE, target)


def copy_of(target: Target, **changes: Any) -> Any:
    """Returns a draft model that is a copy of the target, so that all its tokens are accepted."""
    drafter = lm.Drafter(lm.Config(model=target.model.config.to_dict(), num_draft=4, **changes), target)
    drafter.model.load_state_dict(target.model.state_dict())
    return drafter.eval()


def greedy_texts(model: Any, ids: Any, **settings: Any) -> tuple[list[list[int]], int]:
    """Returns (greedy texts, number of forward passes of the model)."""
    runs: list[int] = []
    hook = model.register_forward_hook(lambda *_: runs.append(1))
    ids_BT = torch.as_tensor(ids)
    arguments = {"attention_mask": torch.ones_like(ids_BT), "max_new_tokens": NUM_NEW, "do_sample": False} | settings
    arguments = {key: value for key, value in arguments.items() if value is not None}
    out = model.generate(ids_BT, **arguments)
    hook.remove()
    return out.tolist(), len(runs)


def custom_arguments(out: Path) -> dict[str, Any]:
    """Returns the arguments with which `model.generate` runs an export."""
    return {"custom_generate": str(out), "trust_remote_code": True}


# --- Folders for custom_generate -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", names())
def test_custom_generate_runs_every_family(
    root: Path, tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a folder that was moved; the text is the target's own."""
    drafter = example(family, target_of(root))
    out = export(artifact_of(drafter, tmp_path / "artifact"), "transformers", tmp_path / "out")
    launch = read_launch(out)
    shutil.rmtree(tmp_path / "artifact")
    out = out.rename(tmp_path / "moved")
    drafters = []
    decode = hf.generate

    def record(target: Target, ids: Any, drafter: Any, **settings: Any) -> Any:
        drafters.append(drafter)
        return decode(target, ids, drafter, **settings)

    monkeypatch.setattr(hf, "generate", record)
    model = AutoModelForCausalLM.from_pretrained(root / "llama")
    if "custom_generate" not in launch["settings"]:
        assert family in ("lm", "lookup", "dflash")
        return
    for num_rows, num_new in ((1, 2), (3, 8)):
        ids, mask = padded(prompts(num_rows), side="left")
        arguments = {"attention_mask": mask, "max_new_tokens": num_new}
        text, _ = greedy_texts(model, ids, **arguments, **custom_arguments(out))
        assert text == greedy_texts(drafter.target.model, ids, **arguments)[0]
    assert [find(family).Drafter] * 2 == [type(drafter) for drafter in drafters]
    assert drafters[0] is drafters[1], "the drafter stays loaded"


def test_custom_generate_passes_sampling_arguments_and_artifact(root: Path, tmp_path: Path) -> None:
    out = export(
        artifact_of(example("medusa", target_of(root)), tmp_path / "artifact"), "transformers", tmp_path / "out"
    )
    model = AutoModelForCausalLM.from_pretrained(root / "llama")
    arguments = custom_arguments(out) | {"do_sample": True}
    texts = [greedy_texts(model, prompts(1), **arguments, seed=seed)[0] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    moved = (out / "artifact").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="is not a local folder with an artifact; pass artifact=PATH"):
        greedy_texts(model, prompts(1), **arguments)
    assert greedy_texts(model, prompts(1), **arguments, seed=1, artifact=str(moved))[0] == texts[0]
    with pytest.raises(ValueError, match="was made for target"):
        greedy_texts(tiny_model("llama", seed=3), prompts(1), **arguments, artifact=str(moved))


def test_custom_generate_streams(root: Path, tmp_path: Path) -> None:
    artifact = artifact_of(example("medusa", target_of(root)), tmp_path / "artifact")
    out = export(artifact, "transformers", tmp_path / "out")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(root / "llama"), tiny_tokenizer()
    streamer = TextIteratorStreamer(tokenizer, timeout=60)
    text, _ = greedy_texts(model, prompts(1), **custom_arguments(out), streamer=streamer)
    assert "".join(streamer).split() == tokenizer.decode(text[0]).split()


def test_custom_generate_drafts_for_an_encoder_decoder(root: Path, tmp_path: Path) -> None:
    drafter = lookup.Drafter(lookup.Config(), target_of(root, "t5"))
    artifact = artifact_of(drafter, tmp_path / "artifact")
    out = export(artifact, "transformers", tmp_path / "out")
    model = AutoModelForSeq2SeqLM.from_pretrained(root / "t5")
    assert greedy_texts(model, prompts(1), **custom_arguments(out))[0] == greedy_texts(model, prompts(1))[0]
    with pytest.raises(ValueError, match="vLLM does not draft for encoder-decoders .* export it --to transformers"):
        export(artifact, "vllm", tmp_path / "other")


# --- Assistants ----------------------------------------------------------------------------------------------------


def test_draft_model_runs_as_an_assistant(root: Path, tmp_path: Path) -> None:
    target = target_of(root)
    out = export(artifact_of(copy_of(target, length="fixed"), tmp_path / "artifact"), "transformers", tmp_path / "out")
    assistant = AutoModelForCausalLM.from_pretrained(out)
    assert assistant.generation_config.num_assistant_tokens == 4
    assert len(AutoTokenizer.from_pretrained(out)) == VOCAB_SIZE
    for row in prompts(5):
        text, num_runs = greedy_texts(target.model, [row], assistant_model=assistant)
        expected, num_plain = greedy_texts(target.model, [row])
        assert text == expected
        assert num_plain == NUM_NEW and num_runs <= NUM_NEW // 3, "every drafted token is accepted"
    other = tiny_model("llama", seed=5)
    text, num_runs = greedy_texts(other, prompts(1), assistant_model=assistant)
    assert text == greedy_texts(other, prompts(1))[0] and num_runs > 3, "rejected tokens are replaced"


def test_assistant_has_the_confidence_threshold_of_the_policy(root: Path, tmp_path: Path) -> None:
    target = target_of(root)
    for length, threshold in (("fixed", 0.0), ("confidence=0.7", 0.7)):
        drafter = copy_of(target, length=length)
        out = export(artifact_of(drafter, tmp_path / "artifact"), "transformers", tmp_path / "out")
        assert GenerationConfig.from_pretrained(out).assistant_confidence_threshold == threshold


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("own", [{}, {"own_head": True}], ids=["norm", "norm and head"])
def test_early_exit_with_its_own_norm_is_exported_as_a_model(
    root: Path, tmp_path: Path, architecture: str, own: dict[str, bool]
) -> None:
    """Its logits are the drafter's, and it has only the blocks up to the exit."""
    target = target_of(root, architecture)
    drafter = built(early_exit, early_exit.Config(exit_layer=2, num_draft=4, length="fixed", **own), target)
    out = export(artifact_of(drafter, tmp_path / "artifact"), "transformers", tmp_path / "out")
    assistant = AutoModelForCausalLM.from_pretrained(out)
    assert assistant.config.num_hidden_layers == 2
    ids_BT = torch.tensor([list(range(3, 20))])
    drafted = assistant(ids_BT).logits
    hidden = target.model(ids_BT, output_hidden_states=True).hidden_states[2]
    assert (drafted - drafter.head(drafter.norm(hidden))).abs().max() < 1e-4
    assert (
        greedy_texts(target.model, prompts(1), assistant_model=assistant)[0]
        == greedy_texts(target.model, prompts(1))[0]
    )


def test_early_exit_with_the_targets_norm_and_head_is_exported_as_a_setting(root: Path, tmp_path: Path) -> None:
    target = target_of(root)
    drafter = built(early_exit, early_exit.Config(exit_layer=2, own_norm=False, num_draft=4), target)
    out = export(artifact_of(drafter, tmp_path / "artifact"), "transformers", tmp_path / "out")
    settings = GenerationConfig.from_pretrained(out)
    assert read_launch(out)["settings"]["assistant_early_exit"] == 2
    # In the model's own config, the exit layer would make the assistant, the model itself, draft for itself too.
    assert settings.assistant_early_exit is None and settings.num_assistant_tokens == 4
    assert settings.assistant_confidence_threshold == 0.6 and settings.num_assistant_tokens_schedule == "constant"
    model = AutoModelForCausalLM.from_pretrained(root / "llama")
    model.generation_config = settings
    assert not list(out.glob("*.safetensors"))
    for row in prompts(3):
        text, _ = greedy_texts(model, [row], assistant_early_exit=2)
        assert text == greedy_texts(target.model, [row])[0]


def test_export_contains_a_fine_tuned_target(root: Path, tmp_path: Path) -> None:
    """The export contains it as a model, and the early exit drafts for that."""
    target = target_of(root)
    config = early_exit.Config(exit_layer=2, own_norm=False, tunes=True, rank=2, alpha=1.0)
    drafter = built(early_exit, config, target)
    out = export(artifact_of(drafter, tmp_path / "artifact"), "transformers", tmp_path / "out")
    tuned = AutoModelForCausalLM.from_pretrained(out / "target")
    assert read_launch(out)["target"] == str(out / "target")
    tuned.generation_config = GenerationConfig.from_pretrained(out)
    text, _ = greedy_texts(tuned, prompts(1), assistant_early_exit=2)
    assert text == greedy_texts(drafter.target.model, prompts(1))[0] != greedy_texts(target.model, prompts(1))[0]


def test_lookup_is_exported_as_a_setting(root: Path, tmp_path: Path) -> None:
    target = target_of(root)
    drafter = lookup.Drafter(lookup.Config(num_draft=5, max_ngram=2), target)
    out = export(artifact_of(drafter, tmp_path / "artifact"), "transformers", tmp_path / "out")
    settings = GenerationConfig.from_pretrained(out)
    assert (settings.prompt_lookup_num_tokens, settings.max_matching_ngram_size) == (5, 2)
    for row in prompts(3):
        text, _ = greedy_texts(target.model, [row], generation_config=settings)
        assert text == greedy_texts(target.model, [row])[0]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_skipped_blocks_are_exported_as_a_model(root: Path, tmp_path: Path, architecture: str) -> None:
    """Its logits are the target's after a block is removed from it by hand."""
    target = target_of(root, architecture)
    drafter = layerskip.Drafter(layerskip.Config(attention=(1,), mlp=(1,), num_draft=4), target)
    out = export(artifact_of(drafter, tmp_path / "artifact"), "vllm", tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.config.num_hidden_layers == NUM_LAYERS - 1
    stack = target.model.get_decoder()
    blocks = getattr(stack, "layers", None) or stack.h
    del blocks[1]
    config = target.model.config
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[0], config.layer_types[2]]
        assert model.config.layer_types == config.layer_types
    config.num_hidden_layers = NUM_LAYERS - 1
    ids_BT = torch.tensor([list(range(3, 20))])
    logits_BTV, expected_BTV = (one(ids_BT, use_cache=False).logits for one in (model, target.model))
    assert (logits_BTV - expected_BTV).abs().max() < 1e-4


# --- All exports ---------------------------------------------------------------------------------------------------


def test_tensors_have_the_dtype_of_the_stored_target(root: Path, tmp_path: Path) -> None:
    """The stored dtype counts, not the one that the drafter was trained in."""
    half = tiny_model("llama").to(torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    tiny_tokenizer().save_pretrained(tmp_path / "half")
    target = Target.from_pretrained(str(tmp_path / "half"), dtype="float32")
    out = export(artifact_of(copy_of(target), tmp_path / "artifact"), "vllm", tmp_path / "out")
    with safe_open(out / "model.safetensors", framework="pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"


def test_launch_json_is_complete_and_its_python_runs(root: Path, tmp_path: Path) -> None:
    """The Python code of every export for transformers runs unchanged."""
    target = target_of(root)
    drafters = [copy_of(target), lookup.Drafter(lookup.Config(), target)]
    drafters += [example(family, target) for family in ("medusa", "medusa2")]
    for number, drafter in enumerate(drafters):
        out = export(artifact_of(drafter, tmp_path / "artifact"), "transformers", tmp_path / f"out{number}")
        launch = read_launch(out)
        assert launch["artifact"]["target"]["fingerprint"] == target.fingerprint
        assert launch["artifact"]["command"] and launch["checked_with"] == "transformers 5.23.0"
        assert not [value for value in launch["settings"].values() if "staging" in str(value)]
        ast.parse(launch["command"])
        exec(launch["command"].replace("some text", "w3 w4 w3 w4").replace("=64", "=4"), {})


@pytest.mark.parametrize("family", FAMILIES_WITHOUT_SERVER)
def test_export_rejects_families_that_no_server_supports(
    root: Path, tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = artifact_of(example(family, target_of(root)), tmp_path / "artifact")
    monkeypatch.setattr(Target, "from_pretrained", lambda *_, **__: pytest.fail("weights were loaded"))
    for engine in ENGINES[1:]:
        with pytest.raises(
            ValueError, match=f"does not run drafters of family '{family}'; run it with draftsmith"
        ) as error:
            export(artifact, engine, tmp_path / "out")
        assert "\n" not in str(error.value) and "--to transformers as a custom_generate folder" in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", names())
def test_writers_support_the_engines_that_the_family_declares(family: str) -> None:
    """The declaration is shown in model cards, which cannot import the writers."""
    assert writers(family).keys() == {"transformers", *find(family).Drafter.serving_engines}
    assert (family in FAMILIES_WITHOUT_SERVER) == (not find(family).Drafter.serving_engines)


def test_export_rejects_unsupported_input_before_loading_weights(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = target_of(root)
    artifacts = {
        "medusa": example("medusa", target),
        "blocks": example("early_exit", target),
        "part": layerskip.Drafter(layerskip.Config(attention=(1,), mlp=(0, 1)), target),
        "none": layerskip.Drafter(layerskip.Config(online=True), target),
        "lm": copy_of(target),
        "t5": lookup.Drafter(lookup.Config(), target_of(root, "t5")),
    }
    for name, drafter in artifacts.items():
        artifact_of(drafter, tmp_path / name)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").write_text("mine")
    monkeypatch.setattr(Target, "from_pretrained", lambda *_, **__: pytest.fail("weights were loaded"))
    cases = [
        ("medusa", "vlm", "out", {}, "unknown engine 'vlm'; did you mean 'vllm'?"),
        ("medusa", "mlx", "out", {}, "there are transformers, vllm, sglang, speculators"),
        ("medusa", "sglang", "out", {}, "SGLang does not run drafters of family 'medusa'; export it --to vllm, or run"),
        ("blocks", "vllm", "out", {}, "an exit with its own blocks or recycling is not a prefix of the target"),
        ("part", "vllm", "out", {}, r"blocks \[0\] are skipped in part"),
        ("none", "sglang", "out", {}, "no block is skipped"),
        ("lm", "vllm", "my-eagle3-run", {}, "has 'eagle3' in its path"),
        ("lm", "vllm", "DFlash", {}, "has 'DFlash' in its path"),
        ("medusa", "vllm", "eagle-1", {}, "has 'eagle-' in its path"),
        ("lm", "vllm", "taken", {}, "contains other files"),
        ("lm", "vllm", "lm", {}, "is an artifact; name another output folder"),
        ("lm", "vllm", "out", {"target": str(root / "t5")}, "tokenizer|vocabulary|does not draft for encoder"),
        ("lm", "vllm", "out", {"target": "nowhere"}, "'nowhere' is not a local folder"),
        ("t5", "sglang", "out", {}, "does not draft for encoder-decoders"),
        ("nothing", "vllm", "out", {}, "no such folder"),
    ]
    for name, engine, out, more, message in cases:
        with pytest.raises(ValueError, match=message) as error:
            export(tmp_path / name, engine, tmp_path / out, **more)
        assert "\n" not in str(error.value)
    assert (tmp_path / "taken" / "notes.txt").read_text() == "mine"
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*staging*"))


def test_export_rejects_an_artifact_of_another_target(root: Path, tmp_path: Path) -> None:
    artifact = artifact_of(copy_of(target_of(root)), tmp_path / "artifact")
    tiny_model("llama", seed=9).save_pretrained(tmp_path / "other")
    tiny_tokenizer().save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="was made for target"):
        export(artifact, "vllm", tmp_path / "out", str(tmp_path / "other"))
    assert not (tmp_path / "out").exists()
    shutil.move(root / "llama", root / "gone")
    try:
        with pytest.raises(ValueError, match="name the artifact's target with --target"):
            export(artifact, "vllm", tmp_path / "out")
        out = export(artifact, "vllm", tmp_path / "out", str(root / "gone"))
    finally:
        shutil.move(root / "gone", root / "llama")
    assert f"vllm serve {root / 'gone'} " in read_launch(out)["command"]


@pytest.mark.parametrize("how", ["name", "link", "folder"])
def test_export_copies_nothing_from_outside_the_artifact(root: Path, tmp_path: Path, how: str) -> None:
    artifact = artifact_of(lookup.Drafter(lookup.Config(), target_of(root)), tmp_path / "artifact")
    manifest = json.loads((artifact / "draft_config.json").read_text())
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.txt").write_text("secret")
    if how == "link":
        (artifact / "secret.txt").symlink_to(outside / "secret.txt")
    if how == "folder":
        (artifact / "notes").symlink_to(outside)
    name = {"name": "../outside/secret.txt", "link": "secret.txt", "folder": "notes/secret.txt"}[how]
    (artifact / "draft_config.json").write_text(json.dumps(manifest | {"files": [name]}))
    with pytest.raises(ValueError, match="names the file|is a link that leads out of"):
        export(artifact, "vllm", tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_failed_export_keeps_the_previous_one(root: Path, tmp_path: Path) -> None:
    target = target_of(root)
    out = export(artifact_of(copy_of(target), tmp_path / "artifact"), "vllm", tmp_path / "out")
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    blocks = artifact_of(example("early_exit", target), tmp_path / "blocks")
    with pytest.raises(ValueError, match="not a prefix of the target"):
        export(blocks, "vllm", tmp_path / "out")
    assert before == {file.name: file.read_bytes() for file in out.iterdir()}
    export(blocks, "transformers", tmp_path / "out")
    assert {file.name for file in out.iterdir()} == {"artifact", "custom_generate", LAUNCH}


def test_export_command(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    artifact = artifact_of(copy_of(target_of(root)), tmp_path / "artifact")
    main(["export", str(artifact), "--to", "vllm", str(tmp_path / "out"), "--target", str(root / "llama")])
    printed = capsys.readouterr().out
    assert read_launch(tmp_path / "out")["command"] in printed and "vLLM 0.32.0" in printed
    with pytest.raises(SystemExit) as stop:
        main(["export", str(artifact), "--to", "sglan", str(tmp_path / "other")])
    assert stop.value.code == 2 and "did you mean 'sglang'" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main(["export", "--help"])
    assert stop.value.code == 0 and "--to ENGINE" in capsys.readouterr().out
