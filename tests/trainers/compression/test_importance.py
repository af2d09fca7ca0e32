"""trainers/compression/importance.py against slow loops over single rows, which have no padding."""

import math

import pytest
import torch
from torch import Tensor

from data.batches import Batch, collate, example
from draftsmith.core.views import blocks_of
from tests.support.models import VOCAB_SIZE, tiny_target
from trainers.compression import importance

TARGET = tiny_target("qwen3")


def rows() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, VOCAB_SIZE, (size,), generator=generator).tolist() for size in (9, 14, 4, 11)]


def batches() -> list[Batch]:
    """Returns the rows, padded, in batches of three and one."""
    found = [example(ids, None, str(index)) for index, ids in enumerate(rows())]
    return [collate(found[:3]), collate(found[3:])]


def hidden(ids: list[int]) -> list[Tensor]:
    """Returns the inputs of each block and the output of the last one, by hooks on the model itself."""
    found: list[Tensor] = []
    blocks = blocks_of(TARGET.model)
    handles = [block.register_forward_pre_hook(lambda _, given: found.append(given[0][0])) for block in blocks]
    handles.append(blocks[-1].register_forward_hook(lambda _, given, out: found.append(out[0])))
    with torch.inference_mode():
        TARGET.model(input_ids=torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    return [states.reshape(-1, TARGET.hidden_size) for states in found]


def cosines(first: Tensor, second: Tensor) -> list[float]:
    return [float(a @ b / (a.norm() * b.norm())) for a, b in zip(first, second, strict=True)]


def test_block_influence_equals_a_slow_loop() -> None:
    found = importance.block_influence(TARGET, batches())
    for layer in range(3):
        alike = [one for ids in rows() for one in cosines(hidden(ids)[layer], hidden(ids)[layer + 1])]
        assert found[layer] == pytest.approx(1 - sum(alike) / len(alike), abs=1e-5)


def test_angular_distance_equals_a_slow_loop() -> None:
    found = importance.angular_distance(TARGET, batches(), 2)
    assert len(found) == 2
    for start in range(2):
        alike = [one for ids in rows() for one in cosines(hidden(ids)[start], hidden(ids)[start + 2])]
        assert found[start] == pytest.approx(sum(math.acos(one) / math.pi for one in alike) / len(alike), abs=1e-4)


def test_activations_equal_a_slow_loop() -> None:
    heads_LH, neurons_LF = importance.activations(TARGET, batches())
    assert heads_LH.shape == (3, 4) and neurons_LF.shape == (3, 48)
    for layer, block in enumerate(blocks_of(TARGET.model)):
        heads_H, neurons_F = torch.zeros(4), torch.zeros(48)
        for ids in rows():
            given: dict[str, Tensor] = {}
            watchers = {
                block.self_attn.o_proj: lambda values, given=given: given.update(heads=values[0]),
                block.mlp.down_proj: lambda values, given=given: given.update(neurons=values[0]),
            }
            with importance.capture_inputs(watchers), torch.inference_mode():
                TARGET.model(input_ids=torch.tensor([ids]))
            for head in range(4):
                norms = [float(values[8 * head : 8 * head + 8].norm()) for values in given["heads"]]
                heads_H[head] += (sum(norms) / len(norms)) ** 2
            neurons_F += given["neurons"].abs().mean(0) ** 2
        torch.testing.assert_close(heads_LH[layer].float(), heads_H.sqrt(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(neurons_LF[layer].float(), neurons_F.sqrt(), rtol=1e-4, atol=1e-5)


def test_capture_inputs_removes_its_hooks() -> None:
    module = torch.nn.Linear(2, 2)
    seen: list[Tensor] = []
    with importance.capture_inputs({module: seen.append}):
        module(torch.ones(1, 2))
    module(torch.ones(1, 2))
    assert len(seen) == 1
