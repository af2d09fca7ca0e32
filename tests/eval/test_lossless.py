"""Tests of the certificate: lossless systems pass, biased verifiers are detected, invalid settings raise.

The seed 0 and the false-alarm probabilities are fixed in advance.

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
from draftsmith.core.fixed_shapes.forwards import Shapes
from draftsmith.core.sampling import Sampling, draw
from draftsmith.core.tree import Draft, Verdict
from draftsmith.drafters import lm, lookup, medusa, medusa2
from draftsmith.verify import Verifier
from draftsmith.verify.research import token
from eval.certificate.chi_square import p_value
from eval.certificate.identity import GreedySettings
from eval.certificate.sampled import GROUPINGS, SampledTestSettings, parse_sampling
from eval.lossless import INCONCLUSIVE, LOSSLESS, LOSSY, NOT_LOSSLESS, certify, lines
from recipes.lossless import LosslessSettings, main
from tests.recipes.in_process import fault_of
from tests.support.distributions import distribution_target
from tests.support.family import built
from tests.support.models import prompts, tiny_config, tiny_target
from tests.support.runs import make_target, run
from tests.support.verify.biased_verifiers import accept_by_target_probability, reuse_one_uniform, sample_for_each_child

FAMILIES: dict[str, Any] = {
    "medusa": medusa.Config(num_heads=3, tree=((0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0))),
    "lm": lm.Config(model=tiny_config("llama", vocab_size=8, num_hidden_layers=1).to_dict(), num_draft=3),
    "lookup": lookup.Config(),
}
SAMPLED = SampledTestSettings(num_rows=500, num_tokens=4, sampled_prompts=2, rows_at_once=125)
GREEDY = GreedySettings(batch_sizes=(1, 3), max_new_tokens=12)
STRICT = SampledTestSettings(
    num_rows=2000, num_tokens=4, sampled_prompts=1, rows_at_once=250, samplings=("temperature=1",)
)
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
    """Returns an artifact of each family for `distribution_target()`."""
    folder, target = tmp_path_factory.mktemp("artifacts"), distribution_target()
    for name, config in FAMILIES.items():
        draftsmith.save(built(find(name), config, target), folder / name, target=target)
    return {name: folder / name for name in FAMILIES}


def certificate_of(
    artifact: Path, sampled: SampledTestSettings = SAMPLED, greedy_settings: GreedySettings = GREEDY
) -> dict[str, Any]:
    return certify(loader(distribution_target().model), [artifact], some_prompts(), sampled, greedy_settings)


def sampled_tests(result: dict[str, Any]) -> list[dict[str, Any]]:
    return [test for test in result["tests"] if test["kind"] == "sampled distribution"]


def greedy_tests(result: dict[str, Any]) -> list[dict[str, Any]]:
    return [test for test in result["tests"] if test["kind"] == "greedy identity"]


# --- Lossless systems ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "verifier"),
    [("medusa", "deterministic"), ("lm", "block"), pytest.param("lookup", "deterministic", marks=pytest.mark.slow)],
)
def test_certify_passes_lossless_families(artifacts: dict[str, Path], name: str, verifier: str) -> None:
    result = certificate_of(artifacts[name])
    assert result["verdict"] == LOSSLESS
    sampled, greedy = sampled_tests(result), greedy_tests(result)
    assert [(test["top_p"], test["top_k"], test["grouped_by"]) for test in sampled] == [
        (top_p, top_k, grouped_by) for top_p, top_k in ((1, 0), (0.9, 0), (1, 5)) for grouped_by in GROUPINGS
    ]
    assert {test["level"] for test in sampled} == {1e-4 / 9}
    assert {test["verifier"] for test in sampled} == {verifier}
    assert all(test["tau"] > 1.02 for test in sampled), [test["tau"] for test in sampled]
    # By rank all tokens at clear positions are tested, by prefix those of large groups.
    assert all(test["num_samples"] > 1_800 for test in sampled if test["grouped_by"] == "rank")
    assert all(sum(at["freedom"] > 0 for at in test["positions"]) >= 3 for test in sampled if "positions" in test)
    assert all(test["detectable_shift"] < 0.25 for test in sampled)
    pairs = [("plain decoding", "transformers"), (str(artifacts[name]), "plain decoding")]
    pairs.append((str(artifacts[name]), "transformers"))
    assert [(test["dtype"], test["batch_size"], (test["drafter"], test["reference"])) for test in greedy] == [
        (dtype, size, pair) for dtype in ("float32", "float64") for size in (1, 3) for pair in pairs
    ]
    assert all(test["num_samples"] == 3 * 12 and not test["errors"] for test in greedy)


def test_certify_compares_with_the_fine_tuned_target(tmp_path: Path) -> None:
    """The fine-tuned target's greedy text and distributions differ from the original's, in float64 too."""
    target, config = distribution_target(), medusa2.Config(num_heads=2, tree=((0,), (1,), (0, 0)), rank=2, alpha=1.0)
    draftsmith.save(built(medusa2, config, target), tmp_path / "fine_tuned", target=target)
    result = certificate_of(tmp_path / "fine_tuned", replace(SAMPLED, samplings=("temperature=1",)))
    assert result["verdict"] == LOSSLESS
    assert all(test["tuned"] for test in sampled_tests(result))
    plain = [(test["drafter"], test["tuned"]) for test in greedy_tests(result) if test["dtype"] == "float64"]
    name = str(tmp_path / "fine_tuned")
    own = [("plain decoding", False), ("plain decoding, fine-tuned by fine_tuned", True), (name, True), (name, True)]
    assert plain == [own[at] for at in (0, 0, 1, 2, 3, 1, 2, 3)]
    assert any(
        "it fine-tunes its target and is tested with the fine-tuned one" in line for line in lines(result, "markdown")
    )


def test_certify_encoder_decoder(tmp_path: Path) -> None:
    target = tiny_target("t5")
    draftsmith.save(lookup.Drafter(lookup.Config(), target), tmp_path / "lookup", target=target)
    sampled = replace(SAMPLED, samplings=("temperature=0.7,top_k=4",), num_rows=1500)
    result = certify(loader(target.model), [tmp_path / "lookup"], some_prompts(vocab_size=64), sampled, BRIEF)
    assert result["verdict"] == LOSSLESS
    assert sampled_tests(result)[1]["num_samples"] > 1_000


def test_certify_too_few_samples_is_inconclusive(artifacts: dict[str, Path]) -> None:
    result = certificate_of(artifacts["lookup"], replace(SAMPLED, num_rows=4), BRIEF)
    assert result["verdict"] == INCONCLUSIVE
    assert {test["verdict"] for test in sampled_tests(result)} == {"too few samples"}


def test_certify_divides_the_false_alarm_among_drafters(artifacts: dict[str, Path]) -> None:
    sampled = replace(SAMPLED, samplings=("temperature=1",), num_rows=64)
    paths = [artifacts["medusa"], artifacts["lookup"]]
    result = certify(loader(distribution_target().model), paths, some_prompts(), sampled, BRIEF)
    assert [test["drafter"] for test in sampled_tests(result)] == [str(path) for path in paths for _ in GROUPINGS]
    assert {test["level"] for test in sampled_tests(result)} == {1e-4 / 6}
    assert len(greedy_tests(result)) == 5


# --- Power -----------------------------------------------------------------------------------------------------------


def no_residual_after_a_rejection(target_probs_BNV: Tensor, draft: Draft, uniforms_BU: Tensor) -> Verdict:
    """WRONG: accepts by the token rule, but then samples from the target's distribution instead of the residual."""
    correct = token.verify(target_probs_BNV, draft, uniforms_BU)
    after_BN = draw(target_probs_BNV, uniforms_BU[:, -1:].expand_as(draft.tokens_BN))
    end_B1 = correct.path_BP.gather(1, correct.num_accepted_B[:, None])
    return replace(correct, next_token_B=after_BN.gather(1, end_B1)[:, 0])


def same_uniforms_in_all_rows(target_probs_BNV: Tensor, draft: Draft, uniforms_BU: Tensor) -> Verdict:
    """WRONG: all rows use the same uniforms."""
    return token.verify(target_probs_BNV, draft, uniforms_BU[:1].expand_as(uniforms_BU))


def flattened_draft_probs(target_probs_BNV: Tensor, draft: Draft, uniforms_BU: Tensor) -> Verdict:
    """WRONG: draft probabilities differ from those that the tokens were sampled from."""
    assert draft.draft_probs_BNV is not None
    flatter = draft.draft_probs_BNV**0.5
    draft = replace(draft, draft_probs_BNV=flatter / flatter.sum(-1, keepdim=True))
    return token.verify(target_probs_BNV, draft, uniforms_BU)


def no_truncation(target_probs_BNV: Tensor, draft: Draft, uniforms_BU: Tensor) -> Verdict:
    """WRONG: gives every token some probability, even those excluded by top-k and top-p."""
    return token.verify(target_probs_BNV + 1e-3, draft, uniforms_BU)


BIASED = [
    ("lm", accept_by_target_probability),
    pytest.param("lm", reuse_one_uniform, marks=pytest.mark.slow),
    pytest.param("lm", no_residual_after_a_rejection, marks=pytest.mark.slow),
    ("lm", same_uniforms_in_all_rows),
    pytest.param("lm", flattened_draft_probs, marks=pytest.mark.slow),
    pytest.param("lookup", same_uniforms_in_all_rows, marks=pytest.mark.slow),
    pytest.param("lookup", accept_by_target_probability, marks=pytest.mark.slow),
    ("medusa", sample_for_each_child),
]


def replace_verifier(
    monkeypatch: pytest.MonkeyPatch, verifier: Callable[..., Verdict], *, for_greedy: bool = False
) -> None:
    """Replaces the verifier of all sampled drafts, or of all greedy ones."""
    original = verify.choose

    def choose(name: str, sampling: Sampling, draft: Draft) -> Verifier:
        if sampling.is_greedy != for_greedy or draft.tree.num_nodes == 1:
            return original(name, sampling, draft)
        return Verifier(name="greedy" if for_greedy else "biased", is_lossless=True, sampling=sampling, verify=verifier)

    monkeypatch.setattr("draftsmith.verify.choose", choose)


@pytest.mark.parametrize(("name", "verifier"), BIASED)
def test_certify_detects_biased_verifiers(
    artifacts: dict[str, Path], name: str, verifier: Callable[..., Verdict], monkeypatch: pytest.MonkeyPatch
) -> None:
    replace_verifier(monkeypatch, verifier)
    result = certificate_of(artifacts[name], STRICT, BRIEF)
    assert result["verdict"] == NOT_LOSSLESS
    assert all(test["verdict"] == "passed" for test in greedy_tests(result))
    assert sampled_tests(result)[0]["verdict"] == "failed"


def test_certify_fails_on_a_token_of_zero_probability(
    artifacts: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    replace_verifier(monkeypatch, no_truncation)
    result = certificate_of(
        artifacts["lm"], replace(SAMPLED, samplings=("temperature=1,top_k=5",), num_rows=400), BRIEF
    )
    assert result["verdict"] == NOT_LOSSLESS
    for test in sampled_tests(result)[:2]:
        assert 0 < test["num_excluded"] < 40
        assert (test["p_value"], test["verdict"]) == (0.0, "failed")


@pytest.mark.parametrize("statistics", [pytest.param(False, marks=pytest.mark.slow), True])
def test_certify_coupled_compares_sampled_text_with_plain_decoding(
    artifacts: dict[str, Path], statistics: bool
) -> None:
    sampled = replace(SAMPLED, verifier="coupled", statistics=statistics, num_rows=250)
    result = certificate_of(artifacts["lm"], sampled, replace(GREEDY, dtypes=("float32",)))
    found = [test for test in result["tests"] if test["kind"] == "sampled identity"]
    assert [(test["top_k"], test["top_p"], test["batch_size"]) for test in found] == [
        (top_k, top_p, size) for top_k, top_p in ((0, 1), (5, 1), (0, 0.9)) for size in (1, 3)
    ]
    for test in found:
        assert (test["drafter"], test["reference"]) == (str(artifacts["lm"]), "plain decoding")
        assert (test["num_samples"], test["ties"], test["errors"], test["verdict"]) == (3 * 12, [], [], "passed")
    assert len(sampled_tests(result)) == 9 * statistics
    assert {test["verdict"] for test in sampled_tests(result)} <= {"passed", "too few samples"}
    assert statistics or result["verdict"] == LOSSLESS
    assert "## Sampled identity, temperature 1, top-k 5" in lines(result, "markdown")


def test_certify_coupled_detects_noise_in_the_order_of_calls(
    artifacts: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def in_order_of_calls(self: Any, probs_XFV: Tensor, depths: Any, rows: Any) -> Tensor:
        return probs_XFV / -torch.rand(len(probs_XFV), 1, probs_XFV.shape[-1]).log()

    monkeypatch.setattr("draftsmith.verify.research.position_noise.PositionNoise.scores", in_order_of_calls)
    greedy_settings = GreedySettings(dtypes=("float32",), batch_sizes=(3,), max_new_tokens=12)
    result = certificate_of(artifacts["lookup"], replace(STRICT, verifier="coupled"), greedy_settings)
    assert result["verdict"] == NOT_LOSSLESS
    (test,) = (test for test in result["tests"] if test["kind"] == "sampled identity")
    assert test["verdict"] == "failed"
    assert any("ERROR" in line and "gap" in line for line in lines(result, "terminal"))


@pytest.mark.parametrize("is_padded", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_certify_compares_bits_of_batch_invariant_text(
    artifacts: dict[str, Path], monkeypatch: pytest.MonkeyPatch, is_padded: bool
) -> None:
    if not is_padded:
        monkeypatch.setattr("draftsmith.decoding.shapes_for", lambda *_: Shapes())
    model, settings = distribution_target().model, GreedySettings(dtypes=("float32",), batch_sizes=(3,))
    result = certify(
        lambda dtype: Target(copy.deepcopy(model).to(getattr(torch, dtype)), batch_invariant=True),
        [artifacts["lookup"]],
        some_prompts(),
        replace(STRICT, verifier="coupled"),
        settings,
    )
    assert result["verdict"] == (LOSSLESS if is_padded else NOT_LOSSLESS)
    assert is_padded or any("other bits of logits" in line for line in lines(result, "terminal"))


def test_certify_lossy_verifier_gets_no_certificate(artifacts: dict[str, Path]) -> None:
    result = certificate_of(artifacts["medusa"], replace(STRICT, verifier="typical"), BRIEF)
    assert result["verdict"] == LOSSY
    assert {test["verdict"] for test in sampled_tests(result)} == {"failed"}
    assert {test["verifier"] for test in result["tests"] if test["drafter"] != "plain decoding"} == {"typical"}
    # A lossy verifier gets no certificate even if it passes all tests.
    result = certificate_of(artifacts["lm"], replace(STRICT, verifier="lenience=1", num_rows=100), BRIEF)
    assert result["verdict"] == LOSSY
    assert {test["verdict"] for test in result["tests"]} == {"passed"}


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


def test_recipe_from_the_command_line(workplace: Path) -> None:
    done = run([sys.executable, "-m", "eval.lossless", *flags()], workplace)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Losslessness: lossless\n")
    assert max(map(len, done.stdout.splitlines()[6:])) <= 130
    result = json.loads((workplace / "out" / "lossless.json").read_text())
    assert {file.name for file in (workplace / "out").iterdir()} == {"lossless.json", "lossless.md"}
    assert result["verdict"] == "lossless"
    assert "-m eval.lossless --target=target" in result["command"]
    assert set(result["versions"]) == {"python", "draftsmith", "torch", "transformers"}
    target = Target.from_pretrained(str(workplace / "target"))
    assert (result["target"]["name"], result["target"]["fingerprint"]) == ("target", target.fingerprint)
    (artifact,) = result["artifacts"]
    assert artifact["manifest"] == json.loads((workplace / "heads" / "draft_config.json").read_text())
    assert sorted(len(prompt["ids"]) for prompt in result["prompts"]) == [1, 3, 9]
    assert result["settings"]["num_rows"] == FLAGS["num_rows"] and result["settings"]["false_alarm"] == 1e-4
    assert result["hardware"] and result["threads"] == 1
    every = {"kind", "drafter", "verifier", "dtype", "num_rows", "num_samples"}
    every |= {"statistic", "degrees_of_freedom", "p_value", "verdict"}
    assert all(set(test) > every for test in result["tests"])
    assert [test["num_rows"] for test in sampled_tests(result)] == [FLAGS["num_rows"]] * 9
    for test in sampled_tests(result):
        assert p_value(test["statistic"], test["degrees_of_freedom"]) == pytest.approx(test["p_value"])
        assert test["p_value"] > test["level"] == 1e-4 / 9
    markdown = (workplace / "out" / "lossless.md").read_text()
    assert markdown.startswith("# Losslessness: lossless\n")
    rows = [line for line in markdown.splitlines() if line.startswith("| heads ")]
    assert len(rows) == 2 + 9
    assert all(f" {test['p_value']:.2g} " in row for test, row in zip(sampled_tests(result), rows[2:], strict=True))


def test_recipe_reports_invalid_flags(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(workplace)
    for words, status, message in (
        (flags(draft="nowhere"), 1, "lossless.py: artifact nowhere: no such folder\n"),
        (flags(drafts="heads", verifier="best"), 2, "unknown setting '--drafts' on the command line; did you mean"),
    ):
        found_status, found = fault_of("lossless", words, monkeypatch, capsys)
        assert found_status == status
        assert found == message if status == 1 else f"{message} --draft?" in found


def test_recipe_exit_status(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(workplace)
    run_settings = LosslessSettings(
        target="target", data="prompts.jsonl", draft=("heads",), output="lossy", num_prompts=3
    )
    sampled = SampledTestSettings(verifier="typical", num_rows=200, num_tokens=3)
    assert main(replace(run_settings, max_steps=1), sampled, replace(BRIEF, batch_sizes=(2,))) == 1
    assert "Losslessness: lossy by construction" in capsys.readouterr().out
    result = json.loads((workplace / "lossy" / "lossless.json").read_text())
    assert {test["num_rows"] for test in sampled_tests(result)} == {64}
    # An existing certificate may be overwritten.
    monkeypatch.setattr("recipes.lossless.certify", lambda *_: result | {"verdict": NOT_LOSSLESS})
    assert main(run_settings, SampledTestSettings(), BRIEF) == 1
    assert json.loads((workplace / "lossy" / "lossless.json").read_text())["verdict"] == NOT_LOSSLESS


def test_recipe_invalid_input_raises_before_loading_weights(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    manifest = json.loads((workplace / "heads" / "draft_config.json").read_text())
    for name, changes in {"alien": {"vocab_size": 99}, "foreign": {"tokenizer_hash": "0" * 32}}.items():
        (workplace / name).mkdir()
        (workplace / name / "draft_config.json").write_text(json.dumps(manifest | changes))
    (workplace / "empty.jsonl").touch()
    good = LosslessSettings(target="target", data="prompts.jsonl", draft=("heads",), output="new", num_prompts=3)
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
    with pytest.raises(ValueError, match="'block' does not support drafts of the sampling scheme 'deterministic'"):
        main(good, SampledTestSettings(verifier="block"), greedy_settings)
    make_target(workplace / "other", seed=5)
    with pytest.raises(ValueError, match="train a drafter for this target"):
        main(replace(good, target="other"), SampledTestSettings(), greedy_settings)
    assert not (workplace / "new").exists()


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (LosslessSettings, {}, "name at least one to certify"),
        (LosslessSettings, {"draft": ("a", "a")}, "name each artifact once"),
        (SampledTestSettings, {"num_rows": 0}, "num_rows is 0"),
        (SampledTestSettings, {"verifier": "best"}, "unknown verifier 'best'"),
        (SampledTestSettings, {"verifier": "greedy"}, "'greedy' is for temperature 0"),
        (SampledTestSettings, {"samplings": ()}, "samplings is empty"),
        (SampledTestSettings, {"samplings": ("temperature=0",)}, "'temperature=0' is greedy, which is always tested"),
        (SampledTestSettings, {"samplings": ("heat=1",)}, "'heat=1' is not valid; expected settings such as"),
        (SampledTestSettings, {"samplings": ("top_k=some",)}, "'top_k=some' is not valid; expected"),
        (SampledTestSettings, {"samplings": ("top_p=2",)}, "top_p is 2.0"),
        (SampledTestSettings, {"sampled_dtype": "bfloat16"}, "sampled_dtype is 'bfloat16'"),
        (SampledTestSettings, {"false_alarm": 0.0}, "false_alarm is 0.0"),
        (SampledTestSettings, {"threads": -1}, "threads is -1"),
        (GreedySettings, {"dtypes": ("float31",)}, "dtypes are"),
        (GreedySettings, {"batch_sizes": (0,)}, "batch sizes are"),
        (GreedySettings, {"max_new_tokens": 0}, "max_new_tokens is 0"),
        (GreedySettings, {"tie_tolerance": -1.0}, "tie_tolerance is -1"),
    ],
)
def test_settings_invalid_values_raise(kind: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**changes)


def test_parse_sampling() -> None:
    assert parse_sampling("top_k=5,temperature=0.7") == Sampling(temperature=0.7, top_k=5)
    assert parse_sampling("top_p=0.9") == Sampling(temperature=1.0, top_p=0.9)
