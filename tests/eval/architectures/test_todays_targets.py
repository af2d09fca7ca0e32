"""What people run today: each decodes with look-up, a draft LM and Medusa, and trains EAGLE-3 and Medusa."""

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from data.batches import collate, example
from data.teacher import complete
from data.teacher_store import TeacherStoreSettings, open_teacher_store, write_teacher_store
from draftsmith import Target
from eval.architectures.check import IDENTICAL, QUICK, check, prompts
from eval.architectures.models import tiny_model, variants
from tests.support.runs import trainer_settings
from trainers import eagle3, medusa

VARIANTS = {variant.name: variant for variant in variants()}
TODAY = (
    "deepseek_v3",
    "falcon_h1",
    "gemma3n_text",
    "gemma4_text",
    "glm4_moe_lite",
    "granitemoehybrid",
    "kimi_linear",
    "lfm2",
    "llama4_text",
    "nemotron_h",
    "qwen3_5_text",
    "qwen3_next",
)


@pytest.mark.slow
@pytest.mark.parametrize("name", TODAY)
def test_decodes_identically_alone_and_ragged(name: str) -> None:
    found = check(tiny_model(VARIANTS[name]), QUICK, only=("lookup", "draft LM", "medusa"))
    assert {way: one.verdict for way, one in found.items()} == dict.fromkeys(found, IDENTICAL) and len(found) == 4


@pytest.mark.slow
@pytest.mark.parametrize("name", TODAY)
@pytest.mark.parametrize(
    ("trainer", "values"),
    [(eagle3, {"num_steps": 3, "draft_vocab": 40}), (medusa, {"num_heads": 3})],
    ids=["eagle3", "medusa"],
)
def test_trains_ten_steps_from_live_teacher_and_store(
    name: str, trainer: ModuleType, values: dict[str, Any], tmp_path: Path
) -> None:
    target, settings = Target(tiny_model(VARIANTS[name])), trainer_settings(trainer, **values)
    layers = trainer.needs(settings, target).layers
    rows = [
        example(ids, [at >= 4 for at in range(len(ids))], str(row))
        for row, ids in enumerate(prompts((12, 20, 9), target.vocab_size))
    ]
    write_teacher_store(target, rows, tmp_path, TeacherStoreSettings(layers=layers))
    stored = open_teacher_store(tmp_path, target)
    for given in (collate(rows), collate([stored[at] for at in range(len(stored))])):
        batch = complete(given, target, layers)
        torch.manual_seed(0)
        drafter = trainer.build(settings, target)
        if hasattr(trainer, "prepare"):
            trainer.prepare(drafter, settings, target, rows)
        optimizer, losses = torch.optim.AdamW(drafter.parameters(), lr=1e-2), []
        for _ in range(10):
            optimizer.zero_grad()
            loss, _ = trainer.loss(drafter, batch, settings, target)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.9 * losses[0], losses
