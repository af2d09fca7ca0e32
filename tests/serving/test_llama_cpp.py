"""Exports run by llama.cpp: the text is the target's, and the acceptance is that of draftsmith's own loop.

llama.cpp runs in `.venv-llamacpp` (./launch.sh serving-test --engine llama.cpp), and draftsmith in this environment, on
the pocket target in float32 and, where exports are quantised, on the same numbers multiplied out.

Shape suffixes: B rows, N nodes, K drafted tokens, D hidden width.
"""

import dataclasses
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import draftsmith
from draftsmith import Target
from draftsmith.artifacts import json_text
from draftsmith.core.tree import Draft, chain
from draftsmith.drafters import dflash, eagle3, lookup, rest
from draftsmith.export import export
from draftsmith.export.launch import read_launch
from draftsmith.export.llama_cpp.ngram_caches import CACHE_FILE, LONGEST, read_cache
from draftsmith.loading import gguf_files
from eval.doctor import llama_cpp
from eval.doctor.serving import ServingCounts, agrees, run_draftsmith
from recipes import doctor
from tests.serving.served_drafters import (
    MAKERS,
    NUM_DRAFT,
    NUM_NEW,
    eagle3_head,
    new_tokens,
    reduced_target,
    show,
)
from tests.support.gguf import END_OF_TEXT, write_gguf
from tests.support.models import VOCAB_SIZE, tiny_model
from trainers.corpora.suffix_arrays import build

PYTHON = os.environ.get("DRAFTSMITH_LLAMA_CPP_PYTHON", "")
"""The interpreter with xllamacpp, which launch.sh names."""
pytestmark = [
    pytest.mark.serving,
    pytest.mark.skipif(not PYTHON, reason="run it by ./launch.sh serving-test --engine llama.cpp"),
]
FLOAT32 = {"quantise": "f32", "quantise_target": "f32"}
"""Export options with which llama.cpp computes as torch does in float32.

Where matrices are in bfloat16, the dtype of the pocket target, llama.cpp rounds what they are multiplied with, too.
"""
CACHE_DRAFT = 8
"""Draft length of llama.cpp's n-gram caches."""


@pytest.fixture(scope="module")
def folder(target: Target, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the target's GGUF files in float32 and q8_0."""
    folder = tmp_path_factory.mktemp("llama_cpp")
    draftsmith.save(lookup.Drafter(lookup.Config(), target), folder / "lookup", target)
    for kind in ("f32", "q8_0"):
        export(folder / "lookup", "llama.cpp", folder / kind, quantise_target=kind)
    return folder


def served(prompts: list[list[int]], gguf: Path | str, run: Path, launch: Any = None) -> ServingCounts:
    return llama_cpp.counts_of(llama_cpp.run(PYTHON, gguf, prompts, NUM_NEW, run, launch))


def test_plain_decoding_gives_the_same_text(
    folder: Path, rows: list[list[int]], texts: list[list[int]], tmp_path: Path
) -> None:
    assert served(rows, folder / "f32" / "target.gguf", tmp_path / "run").texts == new_tokens(rows, texts)


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "tied": ("llama", {"tie_word_embeddings": True}),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama3": ("llama", {"rope_parameters": LLAMA3 | {"rope_theta": 1e2, "original_max_position_embeddings": 16}}),
    "linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}),
    "yarn": ("llama", {"rope_parameters": YARN | {"rope_theta": 1e4}}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
}


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_of_target_gives_the_text_of_transformers(tmp_path: Path, name: str) -> None:
    """Tiny models with random weights, biases and norms included."""
    architecture, changes = SHAPES[name]
    write_gguf(tmp_path / "tokenizer.gguf")
    gguf_files.convert_info(tmp_path / "tokenizer.gguf", tmp_path / "target")
    tiny_model(architecture, intermediate_size=64, sharpness=6.0, **changes).save_pretrained(tmp_path / "target")
    target = Target.from_pretrained(str(tmp_path / "target"), dtype="float32")
    draftsmith.save(lookup.Drafter(lookup.Config(), target), tmp_path / "artifact", target)
    launch = read_launch(export(tmp_path / "artifact", "llama.cpp", tmp_path / "out"))
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(4, VOCAB_SIZE, (4, 40), generator=generator).tolist()
    found = llama_cpp.counts_of(llama_cpp.run(PYTHON, launch["target"], rows, 20, tmp_path / "run")).texts
    expected = []
    for row in rows:
        out = draftsmith.generate(target, [row], max_new_tokens=20, eos_token_id=END_OF_TEXT)
        expected.append(out.sequences[0, 40 : out.lengths[0]].tolist())
    assert len({token for text in expected for token in text}) > 10, "texts that repeat show little"
    assert found == expected


@pytest.mark.parametrize("name", ["draft_model", "first_blocks", "head", "well_trained_block", "biased_block"])
def test_llama_cpp_and_draftsmith_accept_the_same_drafts(
    target: Target, rows: list[list[int]], texts: list[list[int]], tmp_path: Path, name: str
) -> None:
    drafter = MAKERS[name](target, texts, tmp_path)
    expected = run_draftsmith(drafter, rows, NUM_NEW, NUM_DRAFT, cuts_last=True)
    draftsmith.save(drafter, tmp_path / "artifact", target)
    launch = read_launch(export(tmp_path / "artifact", "llama.cpp", tmp_path / "out", **FLOAT32))
    found = served(rows, launch["target"], tmp_path / "run", launch)
    show(name, found, expected)
    assert found.texts == new_tokens(rows, texts)
    assert sum(expected.accepted) > 20 and expected.accepted[1] > 0, "too few accepted tokens for a comparison"
    assert expected.accepted[0] < expected.num_drafts, "everything is accepted: no comparison is possible"
    assert found.num_drafted == expected.num_drafted and found.num_drafts == expected.num_drafts
    assert found.accepted == expected.accepted


class EndsBefore(dflash.Drafter):
    """Ends drafts as llama.cpp does: before the first token whose confidence is below a half."""

    def _with_confidence(self, z_BKD: Tensor) -> Any:
        self._z_BKD = z_BKD
        return super()._with_confidence(z_BKD)

    @torch.no_grad()
    def propose(self, budget: int) -> Draft:
        draft = super().propose(budget)
        previous_BK = draft.tokens_BN[:, :-1]
        confident_K = self.confidence_logits(self._z_BKD[:, : previous_BK.shape[1]], previous_BK)[0].sigmoid() >= 0.5
        length = int(confident_K.long().cumprod(0).sum()) + 1
        return Draft(tokens_BN=draft.tokens_BN[:, :length], tree=chain(length, draft.tokens_BN.device))


def test_llama_cpp_ends_drafts_by_the_confidence(
    target: Target, rows: list[list[int]], texts: list[list[int]], tmp_path: Path
) -> None:
    drafter = MAKERS["biased_block"](target, texts, tmp_path)
    changed = dflash.Drafter(dataclasses.replace(drafter.config, length="confidence=0.5"), target)
    changed.load_state_dict(drafter.state_dict())
    draftsmith.save(changed.eval(), tmp_path / "artifact", target)
    launch = read_launch(export(tmp_path / "artifact", "llama.cpp", tmp_path / "out", **FLOAT32))
    assert launch["settings"]["spec-draft-p-min"] == 0.5
    found = served(rows, launch["target"], tmp_path / "run", launch)
    own = EndsBefore(drafter.config, target)
    own.load_state_dict(drafter.state_dict())
    expected = run_draftsmith(own.eval(), rows, NUM_NEW, NUM_DRAFT, cuts_last=True)
    show("biased_block by confidence", found, expected)
    assert found.texts == new_tokens(rows, texts)
    assert found.num_drafted < expected.num_drafted, "no draft is ended: no comparison is possible"
    assert found.accepted == expected.accepted


@pytest.mark.parametrize("name", ["draft_model", "head"])
def test_quantised_exports_accept_what_draftsmith_does_up_to_rounding(
    target: Target,
    folder: Path,
    rows: list[list[int]],
    texts: list[list[int]],
    tmp_path: Path,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Target and drafter in q8_0, beside draftsmith's loop on the target multiplied out of its file.

    llama.cpp quantises activations too, to 8 bits, so that likely tokens of nearly equal probability change places.
    """
    monkeypatch.setenv("DRAFTSMITH_HOME", str(tmp_path / "home"))
    drafter = MAKERS[name](target, texts, tmp_path)
    draftsmith.save(drafter, tmp_path / "artifact", target)
    options = {"quantise": "q8_0", "quantise_target": "q8_0"}
    launch = read_launch(export(tmp_path / "artifact", "llama.cpp", tmp_path / "out", **options))
    plain = served(rows, launch["target"], tmp_path / "plain")
    found = served(rows, launch["target"], tmp_path / "run", launch)
    quantised = Target.from_pretrained(launch["target"], dtype="float32")
    copy = type(drafter)(drafter.config, quantised)
    copy.load_state_dict(drafter.state_dict())
    expected = run_draftsmith(copy.eval(), rows, NUM_NEW, NUM_DRAFT, cuts_last=True)
    show(f"{name}, q8_0", found, expected)
    assert found.texts == plain.texts
    is_equal = [one == other for one, other in zip(found.texts, expected.texts, strict=True)]
    assert sum(is_equal) >= len(rows) - 2, "the texts differ, and with them what is drafted"
    assert abs(sum(found.accepted) - sum(expected.accepted)) <= 0.1 * sum(expected.accepted)


# --- N-gram caches ------------------------------------------------------------------------------------------------


class CacheReference:
    """What llama.cpp drafts from a cache file and from the texts that it has seen, by the rules of its source."""

    def __init__(self, contexts: dict[tuple[int, ...], int]) -> None:
        self._contexts = contexts
        self._seen: dict[tuple[int, ...], dict[int, int]] = {}
        self._num_seen = 0

    def draft(self, text: list[int]) -> list[int]:
        new = text[self._num_seen :]
        # Of each step only the new tokens are learnt, and after a longer request none at all.
        for length in range(1, LONGEST + 1):
            for end in range(length, len(new)):
                counts = self._seen.setdefault(tuple(new[end - length : end]), {})
                counts[new[end]] = counts.get(new[end], 0) + 1
        self._num_seen = max(self._num_seen, len(text))
        drafted: list[int] = []
        while len(drafted) < CACHE_DRAFT:
            recent = (text + drafted)[-LONGEST:]
            found = [self._from_text(recent), self._from_file(recent)]
            token = next((one for one in found if one is not None), None)
            if token is None:
                break
            drafted.append(token)
        return drafted

    def _from_file(self, recent: list[int]) -> int | None:
        keys = (tuple(recent[-length:]) for length in range(min(LONGEST, len(recent)), 0, -1))
        return next((self._contexts[key] for key in keys if key in self._contexts), None)

    def _from_text(self, recent: list[int]) -> int | None:
        for length in range(min(LONGEST, len(recent)), 0, -1):
            counts = self._seen.get(tuple(recent[-length:]))
            if counts is None:
                continue
            if sum(counts.values()) < (2, 2, 1, 1)[length - 1]:
                return None
            token = max(counts, key=lambda one: counts[one])
            if 100 * counts[token] >= (66, 50, 50, 50)[length - 1] * sum(counts.values()):
                return token
        return None


def counts_by_reference(
    contexts: dict[tuple[int, ...], int], rows: list[list[int]], new: list[list[int]]
) -> ServingCounts:
    reference, accepted, num_drafts, num_drafted = CacheReference(contexts), [0] * CACHE_DRAFT, 0, 0
    for row, text in zip(rows, new, strict=True):
        done = 1
        while done < len(text):
            draft = reference.draft([*row, *text[:done]])[: len(text) - done - 1]
            correct = 0
            while correct < len(draft) and draft[correct] == text[done + correct]:
                accepted[correct] += 1
                correct += 1
            num_drafts, num_drafted = num_drafts + (len(draft) > 0), num_drafted + len(draft)
            done += correct + 1
    return ServingCounts(texts=new, num_drafts=num_drafts, num_drafted=num_drafted, accepted=accepted)


@pytest.mark.parametrize("name", ["ngram", "rest"])
def test_ngram_cache_drafts_what_its_file_says(
    target: Target, folder: Path, rows: list[list[int]], texts: list[list[int]], tmp_path: Path, name: str
) -> None:
    if name == "rest":
        store = build([np.array(text) for text in texts[::2] for _ in range(2)], target.vocab_size)
        drafter: Any = rest.Drafter(rest.Config(), target, (store,))
    else:
        drafter = MAKERS["ngram"](target, texts, tmp_path)
    draftsmith.save(drafter, tmp_path / "artifact", target)
    target_file = str(folder / "f32" / "target.gguf")
    launch = read_launch(export(tmp_path / "artifact", "llama.cpp", tmp_path / "out", target_name=target_file))
    assert launch["target"] == target_file and not (tmp_path / "out" / "target.gguf").exists()
    found = served(rows, target_file, tmp_path / "run", launch)
    new = new_tokens(rows, texts)
    assert found.texts == new
    contexts = read_cache(tmp_path / "out" / CACHE_FILE)
    expected = counts_by_reference(contexts, rows, new)
    show(name, found, expected)
    without_file = counts_by_reference({}, rows, new)
    assert sum(expected.accepted) > 1.3 * sum(without_file.accepted), "the file hardly matters"
    # Tokens that followed equally often are drafted in the order of a hash table.
    assert agrees(found, expected), (found, expected)


def test_lookup_runs_as_exported(target: Target, rows: list[list[int]], tmp_path: Path) -> None:
    draftsmith.save(lookup.Drafter(lookup.Config(max_ngram=2, num_draft=4), target), tmp_path / "artifact", target)
    launch = read_launch(export(tmp_path / "artifact", "llama.cpp", tmp_path / "out", quantise_target="f32"))
    repeated = [(row * 4)[:-1] for row in rows]
    plain = served(repeated, launch["target"], tmp_path / "plain")
    found = served(repeated, launch["target"], tmp_path / "run", launch)
    print(f"lookup: {found.num_drafts} {found.accepted}")
    assert found.texts == plain.texts and sum(found.accepted) > 20 and len(found.accepted) <= 4


# --- What users run -----------------------------------------------------------------------------------------------


def test_python_of_the_launch_file_runs(target: Target, texts: list[list[int]], tmp_path: Path) -> None:
    drafter = eagle3_head(target, texts, tmp_path)
    draftsmith.save(drafter, tmp_path / "artifact", target)
    launch = read_launch(export(tmp_path / "artifact", "llama.cpp", tmp_path / "out", quantise="q4_0"))
    code = launch["python"].replace("server =", "params.cpuparams.n_threads = 1\nserver =").replace(": 64", ": 8")
    done = subprocess.run([PYTHON, "-c", code], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and "'draft_n':" in done.stdout, done.stderr[-2000:]


def test_texts_are_tokenized_as_by_the_target(target: Target, folder: Path, tmp_path: Path) -> None:
    """A text prompt gives the answer that its tokens give."""
    prompts = ["def f(x):\n    return x + 12345", "  # naïve ütf8 ✓\n\tprint('a  b')\r\n", "it's 3.14 I'll  say"]
    gguf = folder / "f32" / "target.gguf"
    by_text = llama_cpp.run(PYTHON, gguf, prompts, 8, tmp_path / "text")
    by_ids = llama_cpp.run(PYTHON, gguf, [target.tokenizer.encode(text) for text in prompts], 8, tmp_path / "ids")
    for one, other in zip(by_text["answers"], by_ids["answers"], strict=True):
        assert one["text"] == other["text"] and one["timings"]["prompt_n"] == other["timings"]["prompt_n"]


def test_doctor_checks_an_export_in_llama_cpp(target: Target, texts: list[list[int]], tmp_path: Path) -> None:
    draftsmith.save(reduced_target(target, texts, tmp_path), tmp_path / "artifact", target)
    arguments = {"data": "python-source", "num_prompts": 3, "max_new_tokens": 24, "num_positions": 24, "depth": 4}
    run = doctor.DoctorSettings(
        draft=str(tmp_path / "artifact"), output=str(tmp_path / "out"), llama_cpp_python=PYTHON, **arguments
    )
    doctor.main(run)
    report = json_text.read(tmp_path / "out" / "doctor.json")
    assert next(one["verdict"] for one in report["findings"] if one["name"] == "export") == "ok"
    shares = report["accepted_per_depth"]
    assert shares["decoding, llama.cpp"] == pytest.approx(shares[f"decoding, {NUM_DRAFT} tokens"], abs=0.1)


def test_a_wrong_layer_shows_in_the_acceptance(
    target: Target, folder: Path, rows: list[list[int]], texts: list[list[int]], tmp_path: Path
) -> None:
    """The comparison above can fail: a head that reads other layers than it was trained on is accepted less."""
    drafter = eagle3_head(target, texts, tmp_path)
    expected = run_draftsmith(drafter, rows, NUM_NEW, NUM_DRAFT, cuts_last=True)
    wrong = eagle3.Drafter(eagle3.Config(**{**vars(drafter.config), "layers": (1, 3, 4)}), target)
    wrong.load_state_dict(drafter.state_dict())
    draftsmith.save(wrong, tmp_path / "artifact", target)
    launch = read_launch(export(tmp_path / "artifact", "llama.cpp", tmp_path / "out", **FLOAT32))
    found = served(rows, launch["target"], tmp_path / "run", launch)
    assert found.texts == new_tokens(rows, texts)
    assert not agrees(found, expected), (found, expected)
