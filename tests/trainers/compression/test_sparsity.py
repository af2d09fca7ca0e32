"""trainers/compression/sparsity.py: the weights set to zero, against slow loops."""

import copy

import pytest
import torch
from torch import Tensor

from data.batches import collate, example
from draftsmith import Target
from draftsmith.core.views import blocks_of
from tests.support.models import VOCAB_SIZE, tiny_model
from trainers.compression import sparsity
from trainers.compression.importance import capture_inputs


def texts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, VOCAB_SIZE, (size,), generator=generator).tolist() for size in (9, 14, 4)]


def test_keep_mask_by_hand() -> None:
    scores_OI = torch.tensor([[1.0, 5, 2, 3, 9, 8, 7, 6], [4, 3, 2, 1, 10, 20, 30, 40]])
    by_row = sparsity.keep_mask(scores_OI, 0.25, is_two_of_four=False, by_row=True)
    assert by_row.tolist() == [[index in (4, 5) for index in range(8)], [index in (6, 7) for index in range(8)]]
    of_all = sparsity.keep_mask(scores_OI, 0.25, is_two_of_four=False, by_row=False)
    assert scores_OI[of_all].sort().values.tolist() == [10, 20, 30, 40]
    two = sparsity.keep_mask(scores_OI, 0.5, is_two_of_four=True, by_row=True)
    assert scores_OI[two].tolist() == [5, 3, 9, 8, 4, 3, 30, 40]


@pytest.mark.parametrize("is_two_of_four", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "gpt_neox"])
def test_wanda_uses_the_inputs_from_sparse_blocks(architecture: str, is_two_of_four: bool) -> None:
    """The reference runs every text by itself for every block, after all earlier blocks are sparse."""
    model = tiny_model(architecture)
    expected = copy.deepcopy(model)
    for block in blocks_of(expected):
        layers = sparsity.linears_of_block(expected, block)
        given: dict[int, list[Tensor]] = {index: [] for index in range(len(layers))}
        for ids in texts():
            watchers = {one: lambda x, seen=given[index]: seen.append(x[0]) for index, one in enumerate(layers)}
            with capture_inputs(watchers), torch.inference_mode():
                expected(input_ids=torch.tensor([ids]))
        for index, layer in enumerate(layers):
            norms_I = torch.cat(given[index]).square().sum(0).sqrt()
            for row_I in layer.weight.data:
                groups = row_I.view(-1, 4) if is_two_of_four else row_I[None]
                for group, norms in zip(groups, norms_I.view(groups.shape), strict=True):
                    scores = (group.abs() * norms).tolist()
                    fewest = sorted(range(len(scores)), key=scores.__getitem__)[: len(scores) // 2]
                    group[fewest] = 0
    batches = [collate([example(ids, None, str(len(ids))) for ids in texts()])]
    sparsity.prune_by_wanda(Target(model), batches, 0.5, is_two_of_four=is_two_of_four)
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(weight, expected.state_dict()[name], msg=name)


def test_magnitude_pruning_and_unsupported_models() -> None:
    model = tiny_model("llama")
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    sparsity.prune_by_magnitude(model, 0.75, is_two_of_four=False)
    for name, weight in model.state_dict().items():
        if "_proj" in name:
            is_zero, was = weight == 0, before[name].abs()
            assert int(is_zero.sum()) == weight.numel() // 4 and was[is_zero].max() <= was[~is_zero].min()
            assert torch.equal(weight[~is_zero], before[name][~is_zero])
        else:
            assert torch.equal(weight, before[name])
    assert sparsity.num_zeros(model) == sum(block_weights(model)) // 4
    with pytest.raises(ValueError, match=r"^GPT2LMHeadModel has no nn.Linear in its blocks"):
        sparsity.prune_by_magnitude(tiny_model("gpt2"), 0.5, is_two_of_four=False)
    with pytest.raises(ValueError, match=r"a linear layer of 50 inputs has no groups of 4"):
        sparsity.prune_by_magnitude(tiny_model("llama", intermediate_size=50), 0.5, is_two_of_four=True)


def block_weights(model: torch.nn.Module) -> list[int]:
    return [one.weight.numel() for block in blocks_of(model) for one in sparsity.linears_of_block(model, block)]
