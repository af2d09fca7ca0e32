"""Exports for llama.cpp: GGUF files read back by transformers' own reader, cache files, commands and rejected input.

What llama.cpp does with them is tested in tests/serving/test_llama_cpp.py.

Shape suffixes: S tokens of a text.
"""

import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import draftsmith
from draftsmith import Target
from draftsmith.drafters import eagle3, early_exit, lm, lookup, medusa, ngram, rest
from draftsmith.export import export
from draftsmith.export.launch import read_launch
from draftsmith.export.llama_cpp import models
from draftsmith.export.llama_cpp.ngram_caches import (
    LONGEST,
    MIN_COUNTS,
    MIN_PERCENTS,
    counted,
    needed,
    read_cache,
    write_cache,
)
from draftsmith.export.llama_cpp.tokenizers import tokenizer_values
from draftsmith.loading import gguf_contents
from draftsmith.loading.gguf_contents import interleave, read_tensors, read_values
from draftsmith.loading.gguf_files import convert_info, read_header
from draftsmith.loading.target_names import model_folder
from tests.support.gguf import TOKENS, write_gguf
from tests.support.models import VOCAB_SIZE, WIDTH, scramble, tiny_model, tiny_tokenizer
from trainers import import_eagle3, import_lm
from trainers.corpora import kneser_ney
from trainers.corpora.suffix_arrays import build
from trainers.training.run_settings import RunSettings

HEAD = {"num_heads": 4, "num_kv_heads": 2, "head_width": 8, "inner_width": 64}
NUM_LAYERS = 8


@pytest.fixture(scope="session", autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A cache folder for converted files."""
    with pytest.MonkeyPatch.context() as patch:
        path = tmp_path_factory.mktemp("home")
        patch.setenv("DRAFTSMITH_HOME", str(path))
        yield path


@pytest.fixture(scope="session")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The GGUF file of a tiny target."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path)
    return path


@pytest.fixture(scope="session")
def tokenizer(gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer") / "info"
    convert_info(gguf, folder)
    return AutoTokenizer.from_pretrained(folder)


def save_target(folder: Path, tokenizer: Any, architecture: str = "llama", **changes: Any) -> Target:
    tiny_model(architecture, intermediate_size=64, **changes).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Target.from_pretrained(str(folder), dtype="float32")


@pytest.fixture(scope="session")
def target(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Target:
    """A tiny target of eight blocks in a transformers folder."""
    return save_target(tmp_path_factory.mktemp("target") / "target", tokenizer, num_hidden_layers=NUM_LAYERS)


def head(target: Target, **changes: Any) -> eagle3.Drafter:
    drafter = eagle3.Drafter(
        eagle3.Config(**{"layers": (2, 4, 5), "draft_vocab": 40, "width": 0} | HEAD | changes), target
    )
    scramble(drafter, seed=1)
    drafter.set_vocabulary(torch.arange(len(drafter.d2t)) * VOCAB_SIZE // len(drafter.d2t))
    return drafter.eval()


def draft_model(target: Target, architecture: str = "llama", **changes: Any) -> lm.Drafter:
    model = tiny_model(architecture, seed=3, num_hidden_layers=2, intermediate_size=64, **changes)
    drafter = lm.Drafter(lm.Config(model=model.config.to_dict(), num_draft=4, length="confidence=0.3"), target)
    drafter.model.load_state_dict(model.state_dict())
    return drafter


def exported(drafter: Any, folder: Path, **options: Any) -> tuple[Path, dict[str, Any]]:
    draftsmith.save(drafter, folder / "artifact", drafter.target)
    out = export(folder / "artifact", "llama.cpp", folder / "out", **options)
    return out, read_launch(out)


def flags(launch: dict[str, Any]) -> list[str]:
    words = shlex.split(launch["command"])
    assert words[0] == "llama-server"
    return words[1:]


# --- Models --------------------------------------------------------------------------------------------------------

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 128}),  # transformers reads no other width from such files
}


@pytest.mark.parametrize("name", SHAPES)
def test_target_is_read_back_as_the_same_model(tokenizer: Any, tmp_path: Path, name: str) -> None:
    """By transformers' reader of GGUF files, which undoes the order of rotary pairs itself."""
    architecture, changes = SHAPES[name]
    target = save_target(tmp_path / "target", tokenizer, architecture, **changes)
    _, launch = exported(lookup.Drafter(lookup.Config(), target), tmp_path, quantise_target="f32")
    folder = model_folder(launch["target"])
    read = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict()
    written = target.model.state_dict()
    assert read.keys() == written.keys()
    assert all(torch.equal(read[key], weight) for key, weight in written.items())
    again = AutoTokenizer.from_pretrained(folder)
    assert again.get_vocab() == tokenizer.get_vocab()
    text = "def f(x): return x + 12\n"
    assert again.encode(text) == tokenizer.encode(text)


def test_llama3_stretch_is_that_of_transformers(tokenizer: Any) -> None:
    rope = {"rope_type": "llama3", "rope_theta": 5e3, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    model = tiny_model("llama", head_dim=32, rope_parameters=rope | {"original_max_position_embeddings": 64})
    divisors = models.model_tensors(model)["rope_freqs.weight"]
    plain = 5e3 ** -(torch.arange(0, 32, 2) / 32)
    assert torch.allclose(plain / divisors, model.model.rotary_emb.inv_freq, rtol=1e-5)
    assert 1 < divisors.unique().numel() < 16, "the example has waves of every kind"


def test_interleaved_rows_by_hand() -> None:
    rows = torch.arange(8.0)  # two heads of four rows, whose halves are (0, 1) and (2, 3)
    assert interleave(rows, 2).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert interleave(rows[:, None].expand(8, 3), 2)[:, 1].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_draft_model_and_target_are_written_with_one_tokenizer(target: Target, tmp_path: Path) -> None:
    out, launch = exported(draft_model(target), tmp_path, quantise="q8_0")
    words = flags(launch)
    assert words[words.index("--model") + 1] == str(out / "target.gguf") == launch["target"]
    expected = {"spec-type": "draft-simple", "spec-draft-model": str(out / "draft.gguf"), "spec-draft-n-max": 4}
    assert launch["settings"] == expected | {"spec-draft-p-min": 0.3, "spec-draft-sampling": "probabilistic"}
    assert words[words.index("--spec-draft-n-max") + 1] == "4"
    assert f"params.model.path = {launch['target']!r}" in launch["python"]
    assert "params.speculative.draft.n_max = 4" in launch["python"]
    assert any("ten likeliest" in note for note in launch["notes"])
    draft, whole = (read_values(out / file, "tokenizer.") for file in ("draft.gguf", "target.gguf"))
    assert draft == whole and draft["tokenizer.ggml.pre"].value == "smollm"
    assert read_values(out / "draft.gguf")["llama.block_count"].value == 2
    types = read_header(out / "draft.gguf").tensor_types
    assert types["blk.0.attn_q.weight"] == 8 and types["blk.0.attn_norm.weight"] == 0, "q8_0, norms in float32"
    assert set(read_header(out / "target.gguf").tensor_types.values()) == {0}, "the target keeps its float32"


def test_rows_that_no_block_divides_are_written_as_f16(target: Target, tmp_path: Path) -> None:
    out, _ = exported(draft_model(target, hidden_size=40), tmp_path, quantise="q4_0")
    types = read_header(out / "draft.gguf").tensor_types
    assert types["token_embd.weight"] == 1 and types["blk.0.ffn_down.weight"] == 2


def test_target_of_a_gguf_file_is_used_as_it_is(gguf: Path, tmp_path: Path) -> None:
    target = Target.from_pretrained(str(gguf), dtype="float32")
    out, launch = exported(draft_model(target), tmp_path)
    assert launch["target"] == str(gguf) and not (out / "target.gguf").exists()
    written, given = read_values(out / "draft.gguf", "tokenizer."), read_values(gguf, "tokenizer.")
    assert written == given, "every key, with its type"
    _, launch = exported(draft_model(target), tmp_path, quantise_target="q8_0")
    assert launch["target"] == str(out / "target.gguf")


def test_named_target_file_is_used(target: Target, gguf: Path, tmp_path: Path) -> None:
    _, launch = exported(lookup.Drafter(lookup.Config(), target), tmp_path / "own", quantise_target="q4_0")
    out, named = exported(draft_model(target), tmp_path / "named", target_name=launch["target"])
    assert named["target"] == launch["target"] and not (out / "target.gguf").exists()


def test_early_exit_is_written_as_the_first_blocks(target: Target, tmp_path: Path) -> None:
    drafter = early_exit.Drafter(early_exit.Config(exit_layer=3, own_norm=False), target).eval()
    out, _ = exported(drafter, tmp_path)
    tensors = read_tensors(out / "draft.gguf")
    assert read_values(out / "draft.gguf")["llama.block_count"].value == 3
    assert torch.equal(tensors["blk.2.ffn_up.weight"], target.model.state_dict()["model.layers.2.mlp.up_proj.weight"])


def test_tokenizer_values_hold_special_and_unused_tokens(tokenizer: Any) -> None:
    values = tokenizer_values(tokenizer, "T", VOCAB_SIZE + 3, (2, 3))
    tokens, types = (values[f"tokenizer.ggml.{name}"].value for name in ("tokens", "token_type"))
    assert tokens[:VOCAB_SIZE] == TOKENS and tokens[VOCAB_SIZE:] == ["<|endoftext|>", "[PAD65]", "[PAD66]"]
    assert types[2] == 3 and types[10] == 1 and types[-3:] == [3, 5, 5]
    assert (values["tokenizer.ggml.eos_token_id"].value, values["tokenizer.ggml.eot_token_id"].value) == (2, 3)


# --- Heads ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"fusion_norm": "whole", "norm_residual": True, "own_embedding": True, "layers": (0, 3, 7)},
        {"draft_vocab": 0, "stretch": (8.0, 1.0, 4.0, 8192.0), "head_width": 32, "theta": 5e5},
    ],
    ids=["usual", "own", "stretched"],
)
def test_eagle3_head_is_imported_from_its_export(target: Target, tmp_path: Path, changes: dict[str, Any]) -> None:
    drafter = head(target, **changes)
    out, launch = exported(drafter, tmp_path, target_name="")
    assert launch["settings"]["spec-type"] == "draft-eagle3" and launch["settings"]["no-spec-draft-backend-sampling"]
    assert "params.speculative.draft.backend_sampling = False" in launch["python"]
    values = read_values(out / "draft.gguf")
    assert values["eagle3.target_layers"].value == list(drafter.config.layers)
    if drafter.config.draft_vocab:
        ids = read_tensors(out / "draft.gguf")["d2t"]
        assert torch.equal(ids, drafter.vocabulary()), "the target's ids, not offsets"
    settings = import_eagle3.Settings(head=str(out / "draft.gguf"), width=0)
    imported = import_eagle3.fit(settings, target, [], RunSettings(), tmp_path)
    config, expected = vars(imported.config), vars(drafter.config)
    assert config.pop("stretch") == pytest.approx(expected.pop("stretch"), rel=1e-3)
    assert config.pop("eps") == pytest.approx(expected.pop("eps"), rel=1e-6)  # in float32 there
    assert config == expected
    state = imported.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in drafter.state_dict().items())


@pytest.mark.parametrize("kind", ["", "f16", "f32"])
def test_head_keeps_the_digits_of_the_type_that_the_user_names(tokenizer: Any, tmp_path: Path, kind: str) -> None:
    """The target's file keeps bfloat16, the dtype in which the head is written where no type is named."""
    tiny_model("llama", num_hidden_layers=NUM_LAYERS).bfloat16().save_pretrained(tmp_path / "target")
    tokenizer.save_pretrained(tmp_path / "target")
    drafter = head(Target.from_pretrained(str(tmp_path / "target"), dtype="float32"))
    out, _ = exported(drafter, tmp_path, quantise=kind)
    tensors = read_tensors(out / "draft.gguf")
    dtype = {"": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}[kind]
    assert torch.equal(tensors["output.weight"].float(), drafter.head.weight.to(dtype).float())
    norm_dtype = torch.float32 if kind else torch.bfloat16
    assert torch.equal(tensors["output_norm.weight"], drafter.norm.weight.to(norm_dtype).float())
    types = read_header(out / "target.gguf").tensor_types
    assert all(number == (0 if "norm" in name else 30) for name, number in types.items()), "float32 and bfloat16"


# --- N-gram caches -------------------------------------------------------------------------------------------------


def test_cache_file_by_hand(tmp_path: Path) -> None:
    write_cache(tmp_path / "cache", {(7,): 9, (1, 2, 3, 4): 5})
    expected = [7, -1, -1, -1, 1, 9, 4, 1, 2, 3, 4, 1, 5, 4]
    assert np.fromfile(tmp_path / "cache", dtype="<i4").tolist() == expected
    assert read_cache(tmp_path / "cache") == {(7,): 9, (1, 2, 3, 4): 5}


def test_contexts_that_shorter_ones_make_needless_are_left_out() -> None:
    contexts = {(3,): 4, (2, 3): 4, (1, 2, 3): 5, (0, 1, 2, 3): 5, (9, 2, 3): 4}
    assert needed(contexts) == {(3,): 4, (1, 2, 3): 5}


def test_counted_contexts_are_those_that_pass_the_thresholds() -> None:
    generator = np.random.default_rng(0)
    texts = [generator.integers(0, 5, size) for size in (40, 3, 1, 60, 60)]
    counts: dict[tuple[int, ...], dict[int, int]] = {}
    for text_S in texts:
        ids = text_S.tolist()
        for length in range(1, LONGEST + 1):
            for end in range(length, len(ids)):
                found = counts.setdefault(tuple(ids[end - length : end]), {})
                found[ids[end]] = found.get(ids[end], 0) + 1
    passing = {
        context: found
        for context, found in counts.items()
        if sum(found.values()) >= MIN_COUNTS[len(context) - 1]
        and 100 * max(found.values()) >= MIN_PERCENTS[len(context) - 1] * sum(found.values())
    }
    contexts = counted(texts, vocab_size=5)
    assert contexts.keys() == passing.keys() and 10 < len(contexts) < len(counts)
    assert all(passing[context][token] == max(passing[context].values()) for context, token in contexts.items())


def test_stores_are_exported_as_caches(target: Target, tmp_path: Path) -> None:
    texts = [np.array([9, 10, 11, 30, 31] * 3), np.array([12, 13] * 6)]
    store = build(texts, VOCAB_SIZE)
    out, launch = exported(rest.Drafter(rest.Config(), target, (store,)), tmp_path / "rest", quantise_target="q8_0")
    assert launch["settings"] == {"spec-type": "ngram-cache", "lookup-cache-dynamic": str(out / "ngrams.bin")}
    assert read_cache(out / "ngrams.bin")[13,] == 12
    assert read_header(out / "target.gguf").tensor_types["output.weight"] == 8
    folder = tmp_path / "counts"
    folder.mkdir()
    config = ngram.Config(order=4, length="confidence=0.4")
    save_file(kneser_ney.count_ngrams(texts, config.order, VOCAB_SIZE), folder / "part.safetensors")
    model = kneser_ney.build([folder / "part.safetensors"], config.order, VOCAB_SIZE, folder / "store")
    out, _ = exported(ngram.Drafter(config, target, model), tmp_path / "ngram")
    contexts = read_cache(out / "ngrams.bin")
    for context, token in contexts.items():
        best, chance = model.best(model.path(context)[: len(context) + 1])  # the longer ones begin before a text
        assert best == token and chance >= 0.4
    assert contexts[30,] == 31


# --- Rejected input ------------------------------------------------------------------------------------------------


def test_export_rejects_what_llama_cpp_cannot_run(
    target: Target, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = save_target(tmp_path / "small", tokenizer)
    qwen2 = save_target(tmp_path / "qwen2", tokenizer, "qwen2", num_hidden_layers=NUM_LAYERS)
    windowed = save_target(tmp_path / "windowed", tokenizer, "mistral")
    gpt2 = save_target(tmp_path / "gpt2", tokenizer, "gpt2")
    words = save_target(tmp_path / "words", tiny_tokenizer())
    tiny_model("llama").save_pretrained(tmp_path / "bare")
    bare = Target.from_pretrained(str(tmp_path / "bare"), dtype="float32")
    write_gguf(tmp_path / "other.gguf", pre="gpt-2")
    cases: dict[str, tuple[Any, dict[str, Any], str]] = {
        "medusa": (medusa.Drafter(medusa.Config(), target), {}, "llama.cpp does not run drafters of family 'medusa'"),
        "two layers": (head(target, layers=(2, 4)), {}, "reads 2 hidden layers, .* and llama.cpp's heads three"),
        "norm_output": (head(target, norm_output=True), {}, "trained with norm_output, which llama.cpp does not"),
        "last": (
            head(target, layers=(2, 4, NUM_LAYERS)),
            {},
            "of 'llama' targets llama.cpp does not give",
        ),
        "qwen2": (head(qwen2), {}, "gives drafters no hidden states of 'qwen2' targets"),
        "window": (lookup.Drafter(lookup.Config(), windowed), {}, "attends to the last 7 tokens only"),
        "gpt2": (lookup.Drafter(lookup.Config(), gpt2), {}, "is a model of type 'gpt2', and draftsmith writes"),
        "words": (lookup.Drafter(lookup.Config(), words), {}, "a tokenizer of type WordLevel"),
        "bare": (lookup.Drafter(lookup.Config(), bare), {}, "has no tokenizer, which every GGUF file holds"),
        "kind": (draft_model(target), {"quantise": "q4_k_m"}, "--quantise is 'q4_k_m'; the package gguf writes f32, "),
        "no weights": (lookup.Drafter(lookup.Config(), target), {"quantise": "q8_0"}, "a look-up has no weights"),
        "both": (draft_model(small), {"quantise_target": "f16", "target_name": "x.gguf"}, "drop one of the two"),
        "file": (draft_model(small), {"target_name": "x.gguf"}, "for llama.cpp it must be a GGUF file"),
        "depth": (
            draft_model(target),
            {"target_name": str(tmp_path / "other.gguf")},
            "llama.block_count is 3, and target .* has 8",
        ),
    }
    for name, (drafter, _, _) in cases.items():
        draftsmith.save(drafter, tmp_path / "artifacts" / name, drafter.target)
    monkeypatch.setattr(Target, "from_pretrained", lambda *_, **__: pytest.fail("weights were loaded"))
    for name, (_, options, message) in cases.items():
        with pytest.raises(ValueError, match=message) as error:
            export(tmp_path / "artifacts" / name, "llama.cpp", tmp_path / "out", **options)
        assert "\n" not in str(error.value), name
    with pytest.raises(ValueError, match="only exports for llama.cpp and openvino are quantised, not for vllm"):
        export(tmp_path / "artifacts" / "kind", "vllm", tmp_path / "out", quantise="q8_0")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def rewritten(path: Path, out: Path, **changes: Any) -> str:
    """Writes a GGUF file again with some of its metadata changed, and returns its path."""
    values = read_values(path)
    architecture = values.pop("general.architecture").value
    for key, value in changes.items():
        name = key.replace("__", ".")
        values[name] = gguf_contents.Value(value, values[name].kind, values[name].inner)
    gguf_contents.write_gguf(out, architecture, values, read_tensors(path), "f32")
    return str(out)


def test_import_rejects_files_that_do_not_fit(target: Target, gguf: Path, tmp_path: Path) -> None:
    out, _ = exported(head(target), tmp_path)
    file = out / "draft.gguf"
    tokens = [f"other{number}" for number in range(VOCAB_SIZE)]
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(file.read_bytes()[:-100])
    cases = {
        str(cut): "cut.gguf is cut off: it has",
        str(gguf): "holds a model of architecture 'llama'; an EAGLE-3 head has 'eagle3'; a draft model is imported",
        rewritten(file, tmp_path / "t.gguf", tokenizer__ggml__tokens=tokens): "of another tokenizer: its token",
        rewritten(file, tmp_path / "v.gguf", tokenizer__ggml__tokens=tokens[:9]): "has 9 tokens, and target",
        rewritten(file, tmp_path / "w.gguf", eagle3__target_hidden_size=48): "target_hidden_size is 48, and target",
        rewritten(file, tmp_path / "e.gguf", eagle3__embedding_length=48): "embedding_length is 48, and target",
        rewritten(file, tmp_path / "l.gguf", eagle3__target_layers=[2, 4, 9]): r"reads hidden layers \[2, 4, 9\]",
    }
    for name, message in cases.items():
        with pytest.raises(ValueError, match=message) as error:
            import_eagle3.check(import_eagle3.Settings(head=name), target)  # type: ignore[arg-type]
        assert "\n" not in str(error.value)
    models_of = {
        str(file): "holds a head of architecture 'eagle3', no draft model",
        rewritten(gguf, tmp_path / "m.gguf", tokenizer__ggml__tokens=tokens): "of another tokenizer: its token",
    }
    cut.write_bytes(gguf.read_bytes()[:-100])
    models_of[str(cut)] = "cut.gguf is cut off"
    for name, message in models_of.items():
        with pytest.raises(ValueError, match=message):
            import_lm.check(import_lm.Settings(init=name), target)  # type: ignore[arg-type]


def test_draft_model_in_a_gguf_file_is_imported(target: Target, gguf: Path, tmp_path: Path) -> None:
    """The artifact holds the file's weights, and drafts for a target of another depth."""
    settings = import_lm.Settings(init=str(gguf), num_draft=3, length="fixed")
    import_lm.check(settings, target)  # type: ignore[arg-type]
    draftsmith.save(import_lm.fit(settings, target, [], RunSettings(), tmp_path), tmp_path / "artifact", target)
    drafter = draftsmith.load(tmp_path / "artifact", target)
    read = AutoModelForCausalLM.from_pretrained(model_folder(str(gguf)), dtype="auto").state_dict()
    assert drafter.config.num_draft == 3 and drafter.model.config.num_hidden_layers == 3
    assert all(torch.equal(read[name], weight) for name, weight in drafter.model.state_dict().items())
    assert drafter.model.get_input_embeddings().weight.shape == (VOCAB_SIZE, WIDTH)
