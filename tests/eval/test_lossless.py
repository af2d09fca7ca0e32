"""eval/lossless.py and what it is made of: sound systems pass, biased ones are seen, ties are told from errors.

Fixed beforehand: seed 0, and the false alarms that LawSettings names.

Shape suffixes: V vocabulary.
"""

import copy
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import draftsmith
from data.prompts import Prompt
from draftsmith import Target, verify
from draftsmith.artifacts.families import find
from draftsmith.core.sampling import Sampling, draw
from draftsmith.core.tree import Draft, Verdict
from draftsmith.drafters import lm, lookup, medusa, medusa2
from draftsmith.verify import Verifier
from draftsmith.verify.research import token
from eval.certificate.chi_square import p_value
from eval.certificate.identity import GreedySettings
from eval.certificate.sampled import GROUPINGS, SampledTestSettings, parse_sampling
from eval.lossless import INCONCLUSIVE, LOSSLESS, LOSSY, NOT_LOSSLESS, certify, lines
from recipes.lossless import RunSettings, main
from tests.support.biased_verifiers import accept_by_the_targets_chance, draw_for_each_child, one_uniform_for_all
from tests.support.distributions import distribution_target
from tests.support.family import built
from tests.support.models import prompts, tiny_config, tiny_target
from tests.support.runs import make_target, run

FAMILIES: dict[str, Any] = {
    "medusa": medusa.Config(num_heads=3, tree=((0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0))),
    "lm": lm.Config(model=tiny_config("llama", vocab_size=8, num_hidden_layers=1).to_dict(), num_draft=3),
    "lookup": lookup.Config(),
}
LAWS = SampledTestSettings(num_rows=500, num_tokens=4, law_prompts=2, rows_at_once=125)
GREEDY = GreedySettings(batch_sizes=(1, 3), max_new_tokens=12)
SHARP = SampledTestSettings(num_rows=2000, num_tokens=4, law_prompts=1, rows_at_once=250, laws=("temperature=1",))
BRIEF = GreedySettings(dtypes=("float32",), batch_sizes=(1,), max_new_tokens=2)


def loader(model: Any) -> Callable[[str], Target]:
    return lambda dtype: Target(copy.deepcopy(model).to(getattr(torch, dtype)))


def some_prompts(number: int = 3, *, vocab_size: int = 8) -> list[Prompt]:
    return [
        Prompt(ids=ids, loss_mask=None, text="", category=None, key=f"row-{row}", source="test")
        for row, ids in enumerate(prompts(number, vocab_size=vocab_size))
    ]


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Returns an artifact of each family for `law_target()`."""
    folder, target = tmp_path_factory.mktemp("artifacts"), distribution_target()
    for name, config in FAMILIES.items():
        draftsmith.save(built(find(name), config, target), folder / name, target=target)
    return {name: folder / name for name in FAMILIES}


def certificate(
    artifact: Path, laws: SampledTestSettings = LAWS, greedy_settings: GreedySettings = GREEDY
) -> dict[str, Any]:
    return certify(loader(distribution_target().model), [artifact], some_prompts(), laws, greedy_settings)


def of_law(told: dict[str, Any]) -> list[dict[str, Any]]:
    return [test for test in told["tests"] if test["kind"] == "sampled law"]


def of_greedy(told: dict[str, Any]) -> list[dict[str, Any]]:
    return [test for test in told["tests"] if test["kind"] == "greedy identity"]


# --- Sound systems ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "verifier"), [("medusa", "deterministic"), ("lm", "block"), ("lookup", "deterministic")]
)
def test_every_family_is_certified(artifacts: dict[str, Path], name: str, verifier: str) -> None:
    told = certificate(artifacts[name])
    assert told["verdict"] == LOSSLESS
    laws, identities = of_law(told), of_greedy(told)
    assert [(test["top_p"], test["top_k"], test["judged_by"]) for test in laws] == [
        (top_p, top_k, judged_by) for top_p, top_k in ((1, 0), (0.9, 0), (1, 5)) for judged_by in GROUPINGS
    ]
    assert {test["level"] for test in laws} == {1e-4 / 9}
    assert {test["verifier"] for test in laws} == {verifier}
    assert all(test["tau"] > 1.02 for test in laws), [test["tau"] for test in laws]
    # By rank every token is judged, less those at an unclear edge; by prefix those of large groups.
    assert all(test["num_samples"] > 1_800 for test in laws if test["judged_by"] == "rank")
    assert all(sum(at["freedom"] > 0 for at in test["positions"]) >= 3 for test in laws if "positions" in test)
    assert all(test["sees_shift"] < 0.25 for test in laws)
    pairs = [("plain decoding", "transformers"), (str(artifacts[name]), "plain decoding")]
    pairs.append((str(artifacts[name]), "transformers"))
    assert [(test["dtype"], test["batch_size"], (test["drafter"], test["reference"])) for test in identities] == [
        (dtype, size, pair) for dtype in ("float32", "float64") for size in (1, 3) for pair in pairs
    ]
    assert all(test["num_samples"] == 3 * 12 and not test["errors"] for test in identities)


def test_a_drafter_that_tunes_its_target_is_certified_for_that_one(tmp_path: Path) -> None:
    """Judged by the tuned target's text and laws, in float64 too; the target's own are others."""
    target, config = distribution_target(), medusa2.Config(num_heads=2, tree=((0,), (1,), (0, 0)), rank=2, alpha=1.0)
    draftsmith.save(built(medusa2, config, target), tmp_path / "tuner", target=target)
    told = certificate(tmp_path / "tuner", replace(LAWS, laws=("temperature=1",)))
    assert told["verdict"] == LOSSLESS
    assert all(test["tuned"] for test in of_law(told))
    plain = [(test["drafter"], test["tuned"]) for test in of_greedy(told) if test["dtype"] == "float64"]
    name = str(tmp_path / "tuner")
    own = [("plain decoding", False), ("plain decoding, tuned by tuner", True), (name, True), (name, True)]
    assert plain == [own[at] for at in (0, 0, 1, 2, 3, 1, 2, 3)]
    assert any("it tunes its target, and is judged for the tuned one" in line for line in lines(told, "markdown"))


def test_an_encoder_decoder_is_certified(tmp_path: Path) -> None:
    target = tiny_target("t5")
    draftsmith.save(lookup.Drafter(lookup.Config(), target), tmp_path / "lookup", target=target)
    laws = replace(LAWS, laws=("temperature=0.7,top_k=4",), num_rows=1500)
    told = certify(loader(target.model), [tmp_path / "lookup"], some_prompts(vocab_size=64), laws, BRIEF)
    assert told["verdict"] == LOSSLESS
    assert of_law(told)[1]["num_samples"] > 1_000


def test_too_few_samples_certify_nothing(artifacts: dict[str, Path]) -> None:
    told = certificate(artifacts["lookup"], replace(LAWS, num_rows=4), BRIEF)
    assert told["verdict"] == INCONCLUSIVE
    assert {test["verdict"] for test in of_law(told)} == {"too few samples"}


def test_drafters_share_the_false_alarm(artifacts: dict[str, Path]) -> None:
    laws = replace(LAWS, laws=("temperature=1",), num_rows=64)
    paths = [artifacts["medusa"], artifacts["lookup"]]
    told = certify(loader(distribution_target().model), paths, some_prompts(), laws, BRIEF)
    assert [test["drafter"] for test in of_law(told)] == [str(path) for path in paths for _ in GROUPINGS]
    assert {test["level"] for test in of_law(told)} == {1e-4 / 6}
    assert len(of_greedy(told)) == 5


# --- Power -----------------------------------------------------------------------------------------------------------


def target_law_after_a_rejection(target_probs_BNV: Tensor, draft: Draft, uniforms_BU: Tensor) -> Verdict:
    """WRONG: accepts by the token rule, and draws from the target's law instead of what is left of it."""
    sound = token.verify(target_probs_BNV, draft, uniforms_BU)
    after_BN = draw(target_probs_BNV, uniforms_BU[:, -1:].expand_as(draft.tokens_BN))
    end_B1 = sound.path_BP.gather(1, sound.num_accepted_B[:, None])
    return replace(sound, next_token_B=after_BN.gather(1, end_B1)[:, 0])


def same_uniforms_in_all_rows(target_probs_BNV: Tensor, draft: Draft, uniforms_BU: Tensor) -> Verdict:
    """WRONG: rows that share their randomness."""
    return token.verify(target_probs_BNV, draft, uniforms_BU[:1].expand_as(uniforms_BU))


def flatter_draft_law(target_probs_BNV: Tensor, draft: Draft, uniforms_BU: Tensor) -> Verdict:
    """WRONG: another law of the draft than its tokens were drawn from."""
    assert draft.draft_probs_BNV is not None
    flatter = draft.draft_probs_BNV**0.5
    draft = replace(draft, draft_probs_BNV=flatter / flatter.sum(-1, keepdim=True))
    return token.verify(target_probs_BNV, draft, uniforms_BU)


def law_without_truncation(target_probs_BNV: Tensor, draft: Draft, uniforms_BU: Tensor) -> Verdict:
    """WRONG: a little of every token, whatever top-k and top-p exclude."""
    return token.verify(target_probs_BNV + 1e-3, draft, uniforms_BU)


BIASED = [
    ("lm", accept_by_the_targets_chance),
    ("lm", one_uniform_for_all),
    ("lm", target_law_after_a_rejection),
    ("lm", same_uniforms_in_all_rows),
    ("lm", flatter_draft_law),
    ("lookup", same_uniforms_in_all_rows),
    ("lookup", accept_by_the_targets_chance),
    ("medusa", draw_for_each_child),
]


def judge_by(monkeypatch: pytest.MonkeyPatch, verifier: Callable[..., Verdict], *, greedily: bool = False) -> None:
    """Lets `verifier` judge all sampled drafts, or all greedy ones."""

    def choose(name: str, sampling: Sampling, draft: Draft) -> Verifier:
        if sampling.is_greedy != greedily or draft.tree.num_nodes == 1:
            return verify.choose(name, sampling, draft)
        return Verifier(name="greedy" if greedily else "biased", is_lossless=True, sampling=sampling, verify=verifier)

    monkeypatch.setattr("draftsmith.verify.choose", choose)


@pytest.mark.parametrize(("name", "verifier"), BIASED)
def test_a_biased_verifier_gets_no_certificate(
    artifacts: dict[str, Path], name: str, verifier: Callable[..., Verdict], monkeypatch: pytest.MonkeyPatch
) -> None:
    judge_by(monkeypatch, verifier)
    told = certificate(artifacts[name], SHARP, BRIEF)
    assert told["verdict"] == NOT_LOSSLESS
    assert all(test["verdict"] == "passed" for test in of_greedy(told))
    assert of_law(told)[0]["verdict"] == "failed"


def test_a_token_that_the_law_excludes_is_enough(artifacts: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    judge_by(monkeypatch, law_without_truncation)
    told = certificate(artifacts["lm"], replace(LAWS, laws=("temperature=1,top_k=5",), num_rows=400), BRIEF)
    assert told["verdict"] == NOT_LOSSLESS
    for test in of_law(told)[:2]:
        assert 0 < test["num_excluded"] < 40
        assert (test["p_value"], test["verdict"]) == (0.0, "failed")


def test_a_lossy_verifier_is_tested_and_refused(artifacts: dict[str, Path]) -> None:
    told = certificate(artifacts["medusa"], replace(SHARP, verifier="typical"), BRIEF)
    assert told["verdict"] == LOSSY
    assert {test["verdict"] for test in of_law(told)} == {"failed"}
    assert {test["verifier"] for test in told["tests"] if test["drafter"] != "plain decoding"} == {"typical"}
    # Where the lossy rule happens to keep the law there is still no certificate.
    told = certificate(artifacts["lm"], replace(SHARP, verifier="lenience=1", num_rows=100), BRIEF)
    assert told["verdict"] == LOSSY
    assert {test["verdict"] for test in told["tests"]} == {"passed"}


# --- The command line ------------------------------------------------------------------------------------------------


FLAGS = {
    "target": "target",
    "data": "prompts.jsonl",
    "draft": "heads",
    "output": "out",
    "num_prompts": 3,
    "batch_sizes": 2,
    "dtypes": "float32",
    "max_new_tokens": 6,
    "num_tokens": 3,
    "num_rows": 800,
}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with a target, an artifact for it, and prompts."""
    folder = tmp_path_factory.mktemp("workplace")
    target = make_target(folder / "target")
    drafter = built(medusa, medusa.Config(num_heads=2, tree=((0,), (1,), (2,), (0, 0))), target)
    draftsmith.save(drafter, folder / "heads", target=target)
    rows = [{"prompt": " ".join(f"w{token}" for token in ids)} for ids in prompts(3)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def flags(**changes: Any) -> list[str]:
    return [f"--{key.replace('_', '-')}={value}" for key, value in (FLAGS | changes).items()]


def test_from_the_command_line(workplace: Path) -> None:
    done = run([sys.executable, "-m", "eval.lossless", *flags()], workplace)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Losslessness: lossless\n")
    assert max(map(len, done.stdout.splitlines()[6:])) <= 130
    told = json.loads((workplace / "out" / "lossless.json").read_text())
    assert {file.name for file in (workplace / "out").iterdir()} == {"lossless.json", "lossless.md"}
    assert told["verdict"] == "lossless"
    assert "-m eval.lossless --target=target" in told["command"]
    assert set(told["versions"]) == {"python", "draftsmith", "torch", "transformers"}
    target = Target.from_pretrained(str(workplace / "target"))
    assert (told["target"]["name"], told["target"]["fingerprint"]) == ("target", target.fingerprint)
    (artifact,) = told["artifacts"]
    assert artifact["manifest"] == json.loads((workplace / "heads" / "draft_config.json").read_text())
    assert sorted(len(prompt["ids"]) for prompt in told["prompts"]) == [1, 3, 9]
    assert told["settings"]["num_rows"] == FLAGS["num_rows"] and told["settings"]["false_alarm"] == 1e-4
    assert told["hardware"] and told["threads"] == 1
    every = {"kind", "drafter", "verifier", "dtype", "num_rows", "num_samples"}
    every |= {"statistic", "degrees_of_freedom", "p_value", "verdict"}
    assert all(set(test) > every for test in told["tests"])
    assert [test["num_rows"] for test in of_law(told)] == [FLAGS["num_rows"]] * 9
    for test in of_law(told):
        assert p_value(test["statistic"], test["degrees_of_freedom"]) == pytest.approx(test["p_value"])
        assert test["p_value"] > test["level"] == 1e-4 / 9
    markdown = (workplace / "out" / "lossless.md").read_text()
    assert markdown.startswith("# Losslessness: lossless\n")
    rows = [line for line in markdown.splitlines() if line.startswith("| heads ")]
    assert len(rows) == 2 + 9
    assert all(f" {test['p_value']:.2g} " in row for test, row in zip(of_law(told), rows[2:], strict=True))

    refused = run([sys.executable, "-m", "eval.lossless", *flags(draft="nowhere")], workplace)
    assert refused.returncode == 1
    assert refused.stderr == "lossless.py: artifact nowhere: no such folder\n"
    unknown = run([sys.executable, "-m", "eval.lossless", *flags(drafts="heads", verifier="best")], workplace)
    assert unknown.returncode == 2
    assert "unknown setting '--drafts' on the command line; did you mean --draft?" in unknown.stderr


def test_the_status_says_whether_all_passed(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(workplace)
    run_settings = RunSettings(target="target", data="prompts.jsonl", draft=("heads",), output="lossy", num_prompts=3)
    laws = SampledTestSettings(verifier="typical", num_rows=200, num_tokens=3)
    assert main(replace(run_settings, max_steps=1), laws, replace(BRIEF, batch_sizes=(2,))) == 1
    assert "Losslessness: lossy by construction" in capsys.readouterr().out
    told = json.loads((workplace / "lossy" / "lossless.json").read_text())
    assert {test["num_rows"] for test in of_law(told)} == {64}
    # A certificate may be replaced, and nothing else.
    monkeypatch.setattr("recipes.lossless.certify", lambda *_: told | {"verdict": NOT_LOSSLESS})
    assert main(run_settings, SampledTestSettings(), BRIEF) == 1
    assert json.loads((workplace / "lossy" / "lossless.json").read_text())["verdict"] == NOT_LOSSLESS


def test_mistakes_are_refused_before_the_weights_load(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    manifest = json.loads((workplace / "heads" / "draft_config.json").read_text())
    for name, changes in {"alien": {"vocab_size": 99}, "foreign": {"tokenizer_hash": "0" * 32}}.items():
        (workplace / name).mkdir()
        (workplace / name / "draft_config.json").write_text(json.dumps(manifest | changes))
    (workplace / "empty.jsonl").touch()
    good = RunSettings(target="target", data="prompts.jsonl", draft=("heads",), output="new", num_prompts=3)
    faults = {
        "no such folder": {"draft": ("nowhere",)},
        "is not a draftsmith artifact": {"draft": (".",)},
        "was made for a vocabulary of 99": {"draft": ("heads", "alien")},
        "with another tokenizer": {"draft": ("foreign",)},
        "is empty": {"data": "empty.jsonl"},
        "contains other files": {"output": "."},
        "no config.json": {"target": "heads"},
        "needs as many prompts": {"num_prompts": 1},
    }
    greedy_settings = replace(BRIEF, batch_sizes=(2,))
    with monkeypatch.context() as patched:
        patched.setattr(Target, "from_pretrained", lambda *_, **__: pytest.fail("the weights were loaded"))
        for message, change in faults.items():
            with pytest.raises(ValueError, match=message):
                main(replace(good, **change), SampledTestSettings(), greedy_settings)
    with pytest.raises(ValueError, match="verifier 'block' does not fit a draft drawn deterministic"):
        main(good, SampledTestSettings(verifier="block"), greedy_settings)
    make_target(workplace / "other", seed=5)
    with pytest.raises(ValueError, match="train a drafter for this target"):
        main(replace(good, target="other"), SampledTestSettings(), greedy_settings)
    assert not (workplace / "new").exists()


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (RunSettings, {}, "nothing to certify"),
        (RunSettings, {"draft": ("a", "a")}, "name each artifact once"),
        (SampledTestSettings, {"num_rows": 0}, "num_rows is 0"),
        (SampledTestSettings, {"verifier": "best"}, "unknown verifier 'best'"),
        (SampledTestSettings, {"verifier": "greedy"}, "'greedy' is for temperature 0"),
        (SampledTestSettings, {"laws": ()}, "laws must name"),
        (SampledTestSettings, {"laws": ("temperature=0",)}, "temperature 0 is what greedy identity tests"),
        (SampledTestSettings, {"laws": ("heat=1",)}, "law 'heat=1': expected settings such as"),
        (SampledTestSettings, {"laws": ("top_k=some",)}, "law 'top_k=some': expected"),
        (SampledTestSettings, {"laws": ("top_p=2",)}, "top_p is 2.0"),
        (SampledTestSettings, {"law_dtype": "bfloat16"}, "law_dtype is 'bfloat16'"),
        (SampledTestSettings, {"false_alarm": 0.0}, "false_alarm is 0.0"),
        (SampledTestSettings, {"threads": -1}, "threads is -1"),
        (GreedySettings, {"dtypes": ("float31",)}, "dtypes are"),
        (GreedySettings, {"batch_sizes": (0,)}, "batch sizes are"),
        (GreedySettings, {"max_new_tokens": 0}, "max_new_tokens is 0"),
        (GreedySettings, {"tie_tolerance": -1.0}, "tie_tolerance is -1"),
    ],
)
def test_settings_that_cannot_be_are_refused(kind: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**changes)


def test_a_law_is_read_as_it_is_written() -> None:
    assert parse_sampling("top_k=5,temperature=0.7") == Sampling(temperature=0.7, top_k=5)
    assert parse_sampling("top_p=0.9") == Sampling(temperature=1.0, top_p=0.9)
