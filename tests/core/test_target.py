"""The target: trees, spans, skipped sublayers and hidden layers, each against transformers' own forward."""

import contextlib
import copy
import random
from functools import partial
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import draftsmith
from draftsmith import Target
from draftsmith.core.tree import Tree, chain
from draftsmith.loading.model_info import read_target_info
from tests.support.models import (
    CAUSAL,
    CONTEXT,
    NUM_LAYERS,
    SEQ2SEQ,
    VOCAB_SIZE,
    WIDTH,
    WINDOW,
    padded,
    prompts,
    tiny_config,
    tiny_model,
    tiny_target,
    tiny_tokenizer,
)

# Positions, masks and kernels differ between a tree and a plain forward; logits are between 2 and 10.
TOLERANCE = 2e-4
# The output projections of a block's attention and MLP.
ATTENTION_OUT = ("o_proj", "c_proj", "dense", "out_proj")
MLP_OUT = ("down_proj", "c_proj", "dense_4h_to_h", "fc2")


def random_tree(num_nodes: int, seed: int) -> Tree:
    rng = random.Random(seed)
    return Tree.from_parents([[-1, *(rng.randrange(node) for node in range(1, num_nodes))]])


def path_to(tree: Tree, node: int, row: int = 0) -> list[int]:
    parents, path = tree.parents_RN[row].tolist(), [node]
    while path[-1] != 0:
        path.append(parents[path[-1]])
    return path[::-1]


def random_tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCAB_SIZE, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def plain_logits(model: Any, ids: list[int], **given: Any) -> Tensor:
    name = "decoder_input_ids" if model.config.is_encoder_decoder else "input_ids"
    return model(**{name: torch.tensor([ids])}, use_cache=False, **given).logits[0]


@torch.no_grad()
@pytest.mark.parametrize("attention", [None, "eager"])
@pytest.mark.parametrize("architecture", CAUSAL)
def test_tree_forward_equals_its_paths_one_by_one(architecture: str, attention: str | None) -> None:
    target, rows = tiny_target(architecture, attention), prompts(5)
    assert attention in (None, target.model.config._attn_implementation)
    tree, tokens_BN = random_tree(8, seed=1), random_tokens(5, 8)
    cache = target.new_cache(5)
    target.prefill(rows, cache)
    logits_BNV = target.logits(target.forward(tokens_BN, tree, cache).hidden_BND)
    for row, prompt in enumerate(rows):
        for node in range(8):
            path = path_to(tree, node)
            expected = plain_logits(target.model, prompt + tokens_BN[row, path].tolist())[-1]
            assert (logits_BNV[row, node] - expected).abs().max() < TOLERANCE, (row, node)


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["mistral", "gemma2", "gemma3_text", "phi3"])
def test_sliding_window_counts_positions_instead_of_slots(architecture: str) -> None:
    """A branch of ten nodes with a sibling for each: it takes twice as many cache slots as positions."""
    target, rows = tiny_target(architecture), prompts(2)
    parents = [-1] + [max(0, node - 2 + node % 2) for node in range(1, 20)]
    tree, tokens_BN = Tree.from_parents([parents]), random_tokens(2, 20)
    assert tree.depth > WINDOW
    cache = target.new_cache(2)
    target.prefill(rows, cache)
    logits_BNV = target.logits(target.forward(tokens_BN, tree, cache).hidden_BND)
    for row, prompt in enumerate(rows):
        path = path_to(tree, 19)
        expected = plain_logits(target.model, prompt + tokens_BN[row, path].tolist())[-len(path) :]
        assert (logits_BNV[row, path] - expected).abs().max() < TOLERANCE, row


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["llama", "mistral", "opt"])
def test_each_row_may_have_its_own_tree(architecture: str) -> None:
    target, rows = tiny_target(architecture), prompts(2)
    tree = Tree.from_parents([[-1, 0, 0, 1, 3], [-1, 0, 1, 2, 0]])
    tokens_BN = random_tokens(2, 5)
    cache = target.new_cache(2)
    target.prefill(rows, cache)
    logits_BNV = target.logits(target.forward(tokens_BN, tree, cache).hidden_BND)
    for row, prompt in enumerate(rows):
        for node in range(5):
            path = path_to(tree, node, row)
            expected = plain_logits(target.model, prompt + tokens_BN[row, path].tolist())[-1]
            assert (logits_BNV[row, node] - expected).abs().max() < TOLERANCE, (row, node)


@torch.no_grad()
@pytest.mark.parametrize("architecture", CAUSAL)
def test_a_tree_may_be_fed_in_parts(architecture: str) -> None:
    """Ragged and even rows; parts of one node and of several."""
    target, tree, tokens_BN = tiny_target(architecture), random_tree(7, seed=3), random_tokens(3, 7, seed=4)
    for rows in (prompts(3), [row[:1] for row in prompts(3)]):
        whole, parts = target.new_cache(3), target.new_cache(3)
        for cache in (whole, parts):
            target.prefill(rows, cache)
        expected_BND = target.forward(tokens_BN, tree, whole).hidden_BND
        for first, stop in ((0, 1), (1, 4), (4, 5), (5, 7)):
            part = Tree.from_parents([tree.parents_RN[0, :stop].tolist()])
            found = target.forward(tokens_BN[:, first:stop], part, parts, first=first)
            assert torch.allclose(found.hidden_BND, expected_BND[:, first:stop], atol=2e-5)
        for cache in (whole, parts):
            cache.commit([[0, 1], [0], [0, 1]])
        for row, length in enumerate(whole.lengths):
            mine, theirs = (cache._stores[0][:, row, :, :length] for cache in (parts, whole))
            assert torch.allclose(mine, theirs, atol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("architecture", SEQ2SEQ)
def test_encoder_decoders_run_ragged_chains_and_reject_trees(architecture: str) -> None:
    target, sources, rows = tiny_target(architecture), prompts(3, seed=4), prompts(3)
    ids, mask = padded(sources)
    source = target.encode(ids, mask)
    cache = target.new_cache(3, source=source)
    target.prefill(rows, cache)
    tokens_BN = random_tokens(3, 4)
    logits_BNV = target.logits(target.forward(tokens_BN, chain(4), cache).hidden_BND)
    for row, prompt in enumerate(rows):
        given = {"input_ids": torch.tensor([sources[row]])}
        expected = plain_logits(target.model, prompt + tokens_BN[row].tolist(), **given)[-4:]
        assert (logits_BNV[row] - expected).abs().max() < TOLERANCE, row
    with pytest.raises(ValueError, match="is an encoder-decoder: it verifies chains, not trees"):
        target.forward(tokens_BN, random_tree(4, seed=0), cache)
    with pytest.raises(ValueError, match="is an encoder-decoder, whose blocks cannot be run in parts"):
        target.forward(tokens_BN, chain(4), cache, span=(0, 1))


@torch.no_grad()
@pytest.mark.parametrize("architecture", CAUSAL)
def test_two_spans_equal_the_whole_forward(architecture: str) -> None:
    target, rows = tiny_target(architecture), prompts(3)
    tree, tokens_BN = random_tree(6, seed=2), random_tokens(3, 6)
    whole, parts = target.new_cache(3), target.new_cache(3)
    for cache in (whole, parts):
        target.prefill(rows, cache)
    expected = target.forward(tokens_BN, tree, whole, layers=(0, 1, 2, 3))
    for split in (1, 2, 3):
        below = target.forward(tokens_BN, tree, parts, span=(0, split), layers=(split,))
        assert torch.equal(below.hidden_BND, below.layers[split])
        resume_BND, span = below.hidden_BND, (split, NUM_LAYERS)
        above = target.forward(tokens_BN, tree, parts, span=span, resume_BND=resume_BND, layers=(3,))
        assert torch.allclose(below.hidden_BND, expected.layers[split], atol=1e-6)
        assert torch.allclose(above.hidden_BND, expected.hidden_BND, atol=1e-6)
        assert torch.equal(above.layers[3], above.hidden_BND)
        for cache in (whole, parts):
            assert cache.lengths == [len(row) for row in rows], "a forward commits nothing"
        for row, length in enumerate(whole.lengths):
            written = slice(0, length + 6)
            assert torch.allclose(parts._stores[0][:, row, :, written], whole._stores[0][:, row, :, written], atol=1e-6)
        parts._stores[0][..., max(parts.lengths) :, :] = 7.0


def without_block(model: Any, index: int) -> Any:
    """Returns a copy of the model with one block deleted."""
    copied = copy.deepcopy(model)
    stack = copied.get_decoder()
    layers = next(child for child in stack.children() if isinstance(child, nn.ModuleList))
    del layers[index]
    if getattr(stack.config, "layer_types", None):
        stack.config.layer_types = [kind for at, kind in enumerate(stack.config.layer_types) if at != index]
    for name in ("num_hidden_layers", "n_layer"):
        if hasattr(stack.config, name):
            setattr(stack.config, name, NUM_LAYERS - 1)
    return copied


def without_sublayer(model: Any, index: int, kind: str) -> Any:
    """Returns a copy of the model in which one sublayer's projection to the residual stream is zero."""
    copied = copy.deepcopy(model)
    layers = next(child for child in copied.get_decoder().children() if isinstance(child, nn.ModuleList))
    attention = next(child for name, child in layers[index].named_children() if "attn" in name or name == "attention")
    mlp = getattr(layers[index], "mlp", layers[index])
    home, names = (attention, ATTENTION_OUT) if kind == "attention" else (mlp, MLP_OUT)
    projection = next(getattr(home, name) for name in names if hasattr(home, name))
    for parameter in projection.parameters():
        parameter.data.zero_()
    return copied


@torch.no_grad()
@pytest.mark.parametrize("architecture", CAUSAL)
def test_skipping_sublayers_equals_deleting_them(architecture: str) -> None:
    target, prompt = tiny_target(architecture), prompts(1)[0]
    tree, tokens_BN = random_tree(5, seed=3), random_tokens(1, 5)
    whole_block = frozenset({("attention", 1), ("mlp", 1)})
    cases = [(whole_block, without_block(target.model, 1))]
    for kind, at in (("attention", 2), ("mlp", 0)):
        cases.append((frozenset({(kind, at)}), without_sublayer(target.model, at, kind)))
    full = target.logits(target.forward(tokens_BN, chain(5), target.new_cache(1)).hidden_BND)
    for skipped, reference in cases:
        cache = target.new_cache(1)
        target.forward(torch.tensor([prompt]), chain(len(prompt)), cache, skipped=skipped)
        cache.commit([list(range(len(prompt)))])
        logits_BNV = target.logits(target.forward(tokens_BN, tree, cache, skipped=skipped).hidden_BND)
        for node in range(5):
            expected = plain_logits(reference, prompt + tokens_BN[0, path_to(tree, node)].tolist())[-1]
            assert (logits_BNV[0, node] - expected).abs().max() < TOLERANCE, (sorted(skipped), node)
    again = target.logits(target.forward(tokens_BN, chain(5), target.new_cache(1)).hidden_BND)
    assert torch.equal(full, again), "skipping must not outlast the call"


@torch.no_grad()
@pytest.mark.parametrize("architecture", CAUSAL + SEQ2SEQ)
def test_hidden_layers_equal_transformers(architecture: str) -> None:
    target, rows = tiny_target(architecture), prompts(3)
    ids, _ = padded(rows)
    layers = tuple(range(NUM_LAYERS + 1))
    source = target.encode(*padded(prompts(3, seed=4))) if target.is_encoder_decoder else None
    read = target.read(ids, layers, source=source)
    cache = target.new_cache(3, source=source)
    prefilled = target.prefill(rows, cache, layers=layers)
    for row, prompt in enumerate(rows):
        kept = len(prompt)
        if source is not None:
            given = {"input_ids": torch.tensor([prompts(3, seed=4)[row]]), "decoder_input_ids": torch.tensor([prompt])}
            out = target.model(**given, output_hidden_states=True)
            hidden = out.decoder_hidden_states
        else:
            out = target.model(torch.tensor([prompt]), output_hidden_states=True)
            hidden = out.hidden_states
        for layer in layers:
            # transformers' last entry is normed, ours is not.
            found = [states[layer][row, :kept] for states in (read, prefilled)]
            if layer == NUM_LAYERS:
                found = [target.norm(states) for states in found]
            for states in found:
                assert torch.allclose(states, hidden[layer][0], atol=1e-4), (row, layer)
        logits = target.logits(read[NUM_LAYERS][row : row + 1, :kept])[0]
        assert (logits - out.logits[0]).abs().max() < TOLERANCE
    if architecture != "bart":  # its blocks end with a norm
        assert not torch.allclose(target.norm(read[NUM_LAYERS]), read[NUM_LAYERS], atol=1e-2)


def test_read_has_a_gradient_only_if_enabled() -> None:
    target, ids = Target(tiny_model("llama")), random_tokens(2, 6)
    weight = target.model.get_input_embeddings().weight
    assert target.read(ids, (NUM_LAYERS,))[NUM_LAYERS].requires_grad
    with torch.no_grad():
        assert not target.read(ids, (NUM_LAYERS,))[NUM_LAYERS].requires_grad
    (gradient,) = torch.autograd.grad(target.logits(target.read(ids, (NUM_LAYERS,))[NUM_LAYERS]).sum(), weight)
    assert gradient.abs().max() > 0
    assert weight.grad is None


def state_of(model: Any) -> dict[str, Any]:
    """Returns everything observable on a model but its weights."""
    return {
        "modules": {name: id(module) for name, module in model.named_modules()},
        "attributes": {name: sorted(module.__dict__) for name, module in model.named_modules()},
        "hooks": [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
        "methods": {name: module.__dict__.get("forward") for name, module in model.named_modules()},
        "training": {name: module.training for name, module in model.named_modules()},
        "config": model.config.to_dict(),
        "generation_config": model.generation_config.to_dict(),
        "gradients": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
    }


@pytest.mark.parametrize("architecture", CAUSAL + SEQ2SEQ)
def test_the_model_stays_unchanged(architecture: str) -> None:
    model = tiny_model(architecture)
    values = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    given = {"decoder_input_ids": torch.tensor([[0, 5]])} if model.config.is_encoder_decoder else {}
    before, logits = state_of(model), model(torch.tensor(prompts(1)), **given).logits
    target = Target(model)
    source = target.encode(*padded(prompts(2))) if target.is_encoder_decoder else None
    with torch.no_grad():
        cache = target.new_cache(2, source=source)
        target.prefill(prompts(2), cache)
        target.forward(random_tokens(2, 4), chain(4), cache, layers=(0, 2))
        target.read(random_tokens(2, 4), (1,), source=source)
        if source is None:
            target.forward(random_tokens(2, 4), random_tree(4, seed=5), cache, span=(0, 2))
            target.forward(random_tokens(2, 4), chain(4), cache, skipped=frozenset({("attention", 0), ("mlp", 1)}))
    assert state_of(model) == before
    assert all(torch.equal(tensor, values[name]) for name, tensor in model.state_dict().items())
    after = model(torch.tensor(prompts(1)), **given).logits
    assert torch.equal(after, logits)
    after.sum().backward()  # inference mode must leave no trace either


def test_training_mode_is_not_changed() -> None:
    model = tiny_model("llama").train()
    with contextlib.suppress(ValueError):  # rejecting it is fine too
        Target(model)
    assert model.training


def rejection(architecture: str, **changes: Any) -> str:
    """Returns the error for an unsupported architecture."""
    with pytest.raises(ValueError, match=r".") as error:
        Target(tiny_model(architecture, **changes))
    return str(error.value)


def test_unsupported_architectures_are_rejected_by_name() -> None:
    small = {"hidden_size": WIDTH, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 48}
    problem = "MiniMaxForCausalLM keeps the state of its lightning attention in a cache of its own kind"
    assert rejection("minimax", **small, **heads, num_local_experts=2) == problem


def test_a_model_that_fails_in_its_own_forward_is_rejected() -> None:
    broken = tiny_model("ctrl", n_embd=WIDTH, n_layer=2, n_head=4, dff=48)
    del broken.transformer.layernorm
    with pytest.raises(ValueError, match="CTRLLMHeadModel fails in its own forward of a text"):
        Target(broken)


def test_attention_without_tree_masks_is_rejected() -> None:
    model = tiny_model("llama")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="attention 'flash_attention_2', which takes no tree mask"):
        Target(model)


def test_post_norm_blocks_cannot_be_skipped() -> None:
    target = Target(tiny_model("opt", do_layer_norm_before=False))
    with pytest.raises(ValueError, match="OPTDecoderLayer normalises after its sublayers"):
        target.forward(random_tokens(1, 2), chain(2), target.new_cache(1), skipped=frozenset({("mlp", 0)}))


def test_the_active_copy_of_several_hidden_states_is_read() -> None:
    """Gemma 3n's hidden layers are [copies, B, T, D]; a forward from the middle lacks the other copies."""
    model = tiny_model(
        "gemma3n_text",
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        layer_types=["sliding_attention", "full_attention"],
        hidden_size_per_layer_input=4,
        vocab_size_per_layer_input=VOCAB_SIZE,
        num_kv_shared_layers=0,
        laurel_rank=4,
        altup_num_inputs=2,
        activation_sparsity_pattern=[0.0, 0.0],
    )
    target = Target(model)
    hidden = target.read(torch.tensor([[5, 6, 7]]), (0, 1, 2))
    assert {states.shape for states in hidden.values()} == {(1, 3, WIDTH)}
    expected = model(input_ids=torch.tensor([[5, 6, 7]])).logits
    assert (target.logits(hidden[2]) - expected).abs().max() < 1e-4
    with pytest.raises(ValueError, match="the blocks of Gemma3nForCausalLM cannot be run in parts"):
        target.check_splits()


def test_longrope_limits_the_context_to_its_original_length() -> None:
    """Phi-3's long models rotate all keys anew once a text outgrows the original length; a cache cannot follow."""
    factors = {"long_factor": [4.0] * 4, "short_factor": [1.0] * 4, "original_max_position_embeddings": 24}
    rope = {"rope_type": "longrope", "rope_theta": 10_000.0, **factors}
    target = Target(tiny_model("phi3", rope_parameters=rope, original_max_position_embeddings=24))
    assert target.context_length == 24


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"dtype": "int8"}, "dtype is 'int8'; it must be auto, float32, bfloat16, float16 or float64"),
        ({"dtype": "float23"}, "dtype is 'float23'; it must be auto"),
        ({"device": "meta"}, "device is 'meta', which holds no weights"),
        ({"device": "gpu"}, "device is 'gpu'; it must be auto, cpu, cuda"),
    ],
)
def test_from_pretrained_names_an_unknown_dtype_or_device(given: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Target.from_pretrained("nowhere", **given)


def test_fingerprint_depends_on_the_weights_only(tmp_path: Any) -> None:
    model = tiny_model("llama").to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    loaded = [Target.from_pretrained(str(tmp_path), dtype=dtype) for dtype in ("auto", "float32", torch.bfloat16)]
    assert [target.dtype for target in loaded] == [torch.bfloat16, torch.float32, torch.bfloat16]
    assert len({target.fingerprint for target in [*loaded, Target(model)]}) == 1
    other = tiny_model("llama").to(torch.bfloat16)
    other.model.layers[1].mlp.down_proj.weight.data *= 1.1
    assert Target(other).fingerprint != loaded[0].fingerprint
    assert Target(tiny_model("llama", seed=1)).fingerprint != loaded[0].fingerprint


def test_target_attributes() -> None:
    for architecture in CAUSAL:
        target = tiny_target(architecture)
        found = (target.vocab_size, target.num_layers, target.hidden_size, target.context_length)
        assert found == (VOCAB_SIZE, NUM_LAYERS, WIDTH, CONTEXT), architecture
        assert not target.is_encoder_decoder
    assert tiny_target("t5").is_encoder_decoder and tiny_target("bart").context_length == CONTEXT
    assert tiny_target("t5").context_length > 10**6, "relative positions are unlimited"
    assert tiny_target("llama").name == "LlamaForCausalLM"


def test_folders_without_a_model_are_rejected(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DRAFTSMITH_OFFLINE", "1")
    with pytest.raises(ValueError, match="not a local folder, and DRAFTSMITH_OFFLINE=1 disables access to the hub"):
        Target.from_pretrained(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="has no config.json"):
        Target.from_pretrained(str(tmp_path))
    (tmp_path / "config.json").write_text("{broken")
    with pytest.raises(ValueError, match="cannot be loaded|config.json"):
        Target.from_pretrained(str(tmp_path))
    tiny_config("llama", num_hidden_layers=0).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no blocks: num_hidden_layers is 0 in its config"):
        Target.from_pretrained(str(tmp_path))
    tiny_config("llama").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"truncated")
    with pytest.raises(ValueError, match="cannot be loaded"):
        Target.from_pretrained(str(tmp_path))


def test_damaged_tokenizers_and_adapters_without_a_model_are_named(tmp_path: Any) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="has adapters of PEFT without their model; save it with them merged"):
        Target.from_pretrained(tmp_path / "adapter")
    tiny_model("llama").save_pretrained(tmp_path / "model")
    assert Target.from_pretrained(tmp_path / "model").tokenizer is None
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    for damage in ("{", '{"model": {"type": "Nosuch"}}', ""):
        (tmp_path / "model" / "tokenizer.json").write_text(damage)
        with pytest.raises(ValueError, match=r"the tokenizer of target .* cannot be read \(tokenizer.json, ") as error:
            read_target_info(str(tmp_path / "model"))
        assert "\n" not in str(error.value)


def wrapped(kind: str, model: Any) -> Any:
    """Returns the model as training or serving code may wrap it."""
    if kind == "lora":
        config = peft.LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        return peft.get_peft_model(model, config).eval()
    if kind == "compiled in place":
        model.compile(backend="eager")
        return model
    if kind == "compiled decoder":
        model.model = torch.compile(model.model, backend="eager")
        return model
    return {"compiled": partial(torch.compile, backend="eager"), "parallel": nn.DataParallel}[kind](model)


@pytest.mark.parametrize("architecture", ["llama", pytest.param("gemma2", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "kind",
    [
        "lora",
        "compiled",
        *(pytest.param(f"compiled {how}", marks=pytest.mark.slow) for how in ("in place", "decoder")),
        "parallel",
    ],
)
def test_wrapped_models_are_unwrapped(kind: str, architecture: str) -> None:
    torch.manual_seed(0)
    model = wrapped(kind, tiny_model(architecture))
    target = Target(model)
    inner = model.module if kind == "parallel" else model
    expected = inner.generate(torch.tensor(prompts(1)), do_sample=False, max_new_tokens=12)
    assert draftsmith.generate(target, prompts(1), max_new_tokens=12).sequences.tolist() == expected.tolist()
    if kind == "lora":
        plain = draftsmith.generate(tiny_target(architecture), prompts(1), max_new_tokens=12)
        assert expected.tolist() != plain.sequences.tolist(), "the adapters are active"


def test_prompt_tuning_and_other_objects_are_rejected() -> None:
    tuning = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    with pytest.raises(ValueError, match=r"PeftModelForCausalLM adds trained tokens to its input \(PromptTuningConfig"):
        Target(peft.get_peft_model(tiny_model("llama"), tuning).eval())
    for other in ("a/name", None, nn.Linear(2, 2), tiny_config("llama")):
        with pytest.raises(ValueError, match=f"{type(other).__name__} is not a transformers model"):
            Target(other)
    with pytest.raises(ValueError, match="tokenizer is a str; pass a tokenizer of transformers"):
        Target(tiny_model("llama"), "a/name")
    with pytest.raises(ValueError, match="path is a LlamaForCausalLM; it must be a folder or hub name"):
        Target.from_pretrained(tiny_model("llama"))


def test_models_of_several_dtypes_name_them() -> None:
    model = tiny_model("llama").to(torch.bfloat16)
    model.lm_head.float()
    with pytest.raises(ValueError, match="its weights are of bfloat16 and float32, so cast them to one"):
        Target(model)


class Int8Embedding(nn.Module):
    """An embedding of 8-bit integers beside a model's float32 weights."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.scale = float(weight.abs().max()) / 127
        self.weight = nn.Parameter((weight / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return nn.functional.embedding(tokens, self.weight.float() * self.scale)


def test_integer_weights_beside_floats_are_supported() -> None:
    model = tiny_model("gemma2", attn_implementation="eager")
    model.model.embed_tokens = Int8Embedding(model.model.embed_tokens.weight.detach())
    target = Target(model)
    assert target.dtype == torch.float32
    expected = model.generate(torch.tensor(prompts(1)), do_sample=False, max_new_tokens=8)
    assert draftsmith.generate(target, prompts(1), max_new_tokens=8).sequences.tolist() == expected.tolist()


@pytest.mark.filterwarnings("ignore")
def test_activations_quantised_dynamically_are_named() -> None:
    model = torch.ao.quantization.quantize_dynamic(tiny_model("llama"), {nn.Linear}, torch.qint8)
    with pytest.raises(ValueError, match="Linear layers round activations depending on the other tokens of a forward"):
        Target(model)


def test_llama4_scales_queries_by_each_rows_own_position() -> None:
    """Its layers without rotary embedding count positions in the cache, where rows of a batch are of equal length."""
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size_mlp": 48}
    model = tiny_model(
        "llama4_text",
        hidden_size=WIDTH,
        num_hidden_layers=2,
        intermediate_size=48,
        num_local_experts=2,
        no_rope_layers=[0, 1],
        floor_scale=2,
        attn_scale=2.0,
        **heads,
    )
    target, rows = Target(model), [[5, 6, 7, 8, 9], [10, 11]]
    cache = target.new_cache(2)
    target.prefill(rows, cache)
    out = target.forward(torch.tensor([[12, 13], [14, 15]]), chain(2), cache)
    for row, more in enumerate([[12, 13], [14, 15]]):
        expected = model(input_ids=torch.tensor([rows[row] + more]), use_cache=False).logits[0, -2:]
        assert (target.logits(out.hidden_BND)[row] - expected).abs().max() < 1e-4
