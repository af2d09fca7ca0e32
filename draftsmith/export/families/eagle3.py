"""Exports EAGLE-3 heads: one folder that both vLLM and SGLang load, one of the speculators library, or GGUF files.

The fused hidden layers are listed twice: at the top level with draftsmith's numbers, which vLLM reads, and in
`eagle_config` by the index of the block whose output they are, which SGLang reads.

Shape suffixes: W draft vocabulary.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from draftsmith.artifacts import json_text
from draftsmith.artifacts.published.eagle3 import LAYER_IDS, NAMES, OUTER
from draftsmith.artifacts.published.eagle3_gguf import NAMES as LLAMA_CPP_NAMES
from draftsmith.export.decoder_config import decoder_config
from draftsmith.export.launch import SAMPLES_DRAFTS, Launch, sglang_launch, vllm_launch
from draftsmith.export.llama_cpp.draft_models import DRAFT_FILE, draft_settings
from draftsmith.export.llama_cpp.heads import check_hidden, is_plain_embedding
from draftsmith.export.llama_cpp.launch import llama_cpp_launch
from draftsmith.export.llama_cpp.models import layer_values, stretch_divisors
from draftsmith.export.llama_cpp.targets import drafter_kind, name_values, served_target
from draftsmith.export.models import FIXED
from draftsmith.export.openvino import HEAD_OPTIONS, check_options, openvino_launch
from draftsmith.export.openvino import check_hidden as check_openvino_hidden
from draftsmith.export.source import ExportSource
from draftsmith.export.tensors import Specs, write_tensors
from draftsmith.loading.gguf_contents import array, boolean, interleave, u32, write_gguf

OTHER_NUMBERING = ("deepseek_v2", "deepseek_v3", "glm4_moe_lite", "gpt_oss")
"""Types of target models for which SGLang numbers the layers differently."""


def vllm(source: ExportSource, folder: Path) -> Launch:
    """Writes the folder that vLLM and SGLang load."""
    _write(source, folder, flat_config(source), "midlayer")
    notes = ("vLLM drafts chains, not trees.",) if source.config.width else ()
    requires = f"vLLM's class for {source.target_config.model_type} models must support SupportsEagle3 (hidden states)."
    return vllm_launch(source, _vllm_settings(source), notes=(*notes, requires))


def sglang(source: ExportSource, folder: Path) -> Launch:
    """Writes the same folder; SGLang always uses the target's embedding and a residual stream without norm."""
    config = source.config
    if config.own_embedding:
        raise ValueError("SGLang replaces the head's own embedding by the target's; export it --to vllm")
    if config.norm_residual:
        raise ValueError("SGLang does not support a normed residual stream (norm_residual); export it --to vllm")
    if config.layers[0] == 0 or config.layers[-1] == source.target_info.num_layers:
        raise ValueError(
            f"SGLang supports the outputs of all blocks but the last, and this head reads hidden layers"
            f" {list(config.layers)} of {source.target_info.num_layers}; export it --to vllm"
        )
    kind = source.target_config.model_type
    if kind in OTHER_NUMBERING and config.layers != _default_layers(source):
        raise ValueError(
            f"SGLang numbers the layers of {kind} differently; train the head on {list(_default_layers(source))},"
            " which are its default"
        )
    _write(source, folder, flat_config(source), "midlayer")
    width, num_draft = max(config.width, 1), config.num_draft
    settings = {"algorithm": "EAGLE3", "draft-model-path": str(source.output), "num-steps": num_draft}
    settings |= {"eagle-topk": width, "num-draft-tokens": config.num_nodes + 1 if config.width else num_draft + 1}
    return sglang_launch(source, settings)


def speculators(source: ExportSource, folder: Path) -> Launch:
    """Writes a folder of the speculators library, for further training and for vLLM.

    It always contains the embedding, because the library initialises a missing one at random.
    """
    _write(source, folder, nested_config(source), "layers.0", with_embedding=True)
    notes = ("vLLM drafts chains, not trees.",) if source.config.width else ()
    if source.verifier_name == source.target_name:
        return vllm_launch(source, _vllm_settings(source), notes=notes)
    relative = (
        f"config.json names the verifier {source.verifier_name!r}, relative to this folder: run speculators in this"
        " folder, or export with --target-name and the folder or hub name where the verifier is then."
    )
    return vllm_launch(source, _vllm_settings(source), notes=(*notes, relative))


def _vllm_settings(source: ExportSource) -> dict[str, Any]:
    settings: dict[str, Any] = {"method": "eagle3", "model": str(source.output), "draft_tensor_parallel_size": 1}
    return settings | {"num_speculative_tokens": source.config.num_draft} | SAMPLES_DRAFTS


def llama_cpp(source: ExportSource, folder: Path) -> Launch:
    """Writes the head as a GGUF file beside the target's."""
    config = source.config
    if len(config.layers) != 3:
        raise ValueError(
            f"the head reads {len(config.layers)} hidden layers, {list(config.layers)}, and llama.cpp's heads three;"
            " train one on three, or export it --to vllm"
        )
    if config.fusion_norm == "each" or config.norm_output:
        setting = "norm_output" if config.norm_output else "fusion_norm each"
        raise ValueError(
            f"the head was trained with {setting}, which llama.cpp does not compute; train one without, or export it"
            " --to vllm"
        )
    served = served_target(source)
    check_hidden(served, config.layers, source.target_info.num_layers)
    tensors = _llama_cpp_tensors(source)
    name = "eagle3"
    values = {
        **name_values(str(source.artifact)),
        **layer_values(
            name,
            context=source.target_info.context_length,
            width=source.target_info.hidden_size,
            num_blocks=1,
            inner_width=config.inner_width,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_width=config.head_width,
            theta=config.theta,
            eps=config.eps,
        ),
        f"{name}.target_layers": array(list(config.layers), "INT32"),
        f"{name}.target_hidden_size": u32(source.target_info.hidden_size),
        f"{name}.norm_before_residual": boolean(config.norm_residual),
        f"{name}.norm_before_fc": boolean(config.fusion_norm == "whole"),
        **served.tokenizer,
    }
    write_gguf(folder / DRAFT_FILE, name, values, tensors, drafter_kind(source, source.drafter.target.dtype))
    served.write(folder)
    settings, notes = draft_settings(config)
    settings = {"spec-draft-model": str(source.output / DRAFT_FILE), **settings}
    # Sampled on the backend, overlapping requests read each other's drafts and accept fewer.
    settings["no-spec-draft-backend-sampling"] = True
    likeliest = "llama.cpp drafts a head's likeliest tokens at every temperature, and accepts fewer above 0."
    return llama_cpp_launch(served, "draft-eagle3", settings, notes=(*notes, likeliest))


def openvino(source: ExportSource, folder: Path) -> Launch:
    """Writes the folder of vLLM, which optimum-intel converts, and has the fused layers written into the converted one.

    By itself OpenVINO reads the outputs of blocks 2, n/2 and n - 3, which are one block later than the layers that
    EAGLE-3's authors and vLLM read by default, and of targets with at least ten blocks.
    """
    check_options(source)
    config = source.config
    if len(config.layers) != 3:
        raise ValueError(
            f"the head reads {len(config.layers)} hidden layers, {list(config.layers)}, and OpenVINO GenAI's heads"
            " three; train one on three, or export it --to vllm"
        )
    flags = {"fusion_norm": config.fusion_norm != "none", "norm_output": config.norm_output}
    flags |= {"norm_residual": config.norm_residual, "own_embedding": config.own_embedding}
    if found := [name for name, is_set in flags.items() if is_set]:
        raise ValueError(
            f"the head was trained with {', '.join(found)}, which OpenVINO GenAI does not compute; train one without,"
            " or export it --to vllm"
        )
    check_openvino_hidden(source, config.layers)
    # Without d2t optimum-intel's map of the draft vocabulary is whatever its memory held.
    _write(source, folder, flat_config(source), "midlayer", with_vocabulary=True)
    settings = {"num_assistant_tokens": config.num_draft}
    if config.width:
        settings = {"num_assistant_tokens": config.num_nodes, "branching_factor": config.width}
        settings["tree_depth"] = config.num_draft
    return openvino_launch(
        source,
        settings,
        conversion=HEAD_OPTIONS,
        rt_info={"hidden_layers_list": " ".join(str(layer - 1) for layer in config.layers)},
        notes=(FIXED,) if config.supports_early_stop and config.length != "fixed" else (),
    )


def _llama_cpp_tensors(source: ExportSource) -> dict[str, Tensor]:
    """Returns the head's weights under llama.cpp's names; the draft vocabulary as the target's ids, not offsets."""
    drafter, config = source.drafter, source.config
    tensors = {
        LLAMA_CPP_NAMES[name]: tensor for name, tensor in drafter.state_dict().items() if name in LLAMA_CPP_NAMES
    }
    for name, num_heads in (("attn_q", config.num_heads), ("attn_k", config.num_kv_heads)):
        tensors[f"blk.0.{name}.weight"] = interleave(tensors[f"blk.0.{name}.weight"], num_heads)
    if len(drafter.d2t) < len(drafter.t2d):
        tensors["d2t"] = drafter.vocabulary()
    if config.stretch:
        tensors["rope_freqs.weight"] = stretch_divisors(config.head_width, config.theta, config.stretch)
    embedding = drafter.target.model.get_input_embeddings()
    if drafter.embedding is None and not is_plain_embedding(embedding):
        # llama.cpp gives heads the target's matrix without its scale.
        with torch.no_grad():
            tensors["token_embd.weight"] = embedding(torch.arange(len(drafter.t2d)))
    return tensors


def flat_config(source: ExportSource) -> dict[str, Any]:
    """Returns the configuration that vLLM and SGLang read, with every flag explicit."""
    layers = {}
    if source.target_config.model_type not in OTHER_NUMBERING or source.config.layers != _default_layers(source):
        layers = {
            LAYER_IDS: list(source.config.layers),
            "eagle_config": {"use_aux_hidden_state": True, LAYER_IDS: [layer - 1 for layer in source.config.layers]},
        }
    config = {"architectures": ["LlamaForCausalLMEagle3"], **_layer(source), **_flags(source), **layers}
    return config | {
        "target_hidden_size": source.target_info.hidden_size,
        "num_aux_hidden_states": len(source.config.layers),
    }


def nested_config(source: ExportSource) -> dict[str, Any]:
    """Returns the configuration of the speculators library."""
    proposal = {"proposal_type": "greedy", "speculative_tokens": source.config.num_draft}
    return {
        "speculators_model_type": "eagle3",
        "speculators_version": "0.9.0",
        "architectures": ["Eagle3DraftModel"],
        **_flags(source),
        "target_hidden_size": None,
        LAYER_IDS: list(source.config.layers),
        "dtype": str(source.drafter.target.dtype).removeprefix("torch."),
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [proposal | {"verifier_accept_k": 1, "accept_tolerance": 0.0}],
            "verifier": {"name_or_path": source.verifier_name, "architectures": source.target_config.architectures},
        },
        "transformer_layer_config": _layer(source),
    }


def tensors_of(source: ExportSource, layer: str, *, with_vocabulary: bool = False) -> dict[str, Tensor]:
    """Returns the head's weights by their published names, with `layer` as the layer's prefix.

    The maps between draft and target tokens are among them if they differ, or always with `with_vocabulary`.
    """
    drafter = source.drafter
    published_names = {ours: published for published, ours in NAMES.items()}
    tensors = {}
    for name, tensor in drafter.state_dict().items():
        ours = name.removesuffix(".weight")
        if name in ("d2t", "t2d"):
            if with_vocabulary or len(drafter.d2t) < len(drafter.t2d):
                tensors[name] = tensor
        elif ours.startswith("fusion_norms.") and source.config.fusion_norm == "each":
            tensors[f"fc_norm.{ours.removeprefix('fusion_norms.')}.weight"] = tensor
        else:
            published = published_names[ours]
            tensors[f"{'' if published in OUTER else layer + '.'}{published}.weight"] = tensor
    return tensors


def tensor_specs(
    config: dict[str, Any], layer: str, dtype: torch.dtype, *, has_embedding: bool, has_vocabulary: bool = False
) -> Specs:
    """Returns the tensors that loaders expect for a head with this config.json, derived from that alone."""
    inner = config.get("transformer_layer_config", config)
    width, ffn_width, vocab_size = inner["hidden_size"], inner["intermediate_size"], inner["vocab_size"]
    queries, keys = (inner[name] * inner["head_dim"] for name in ("num_attention_heads", "num_key_value_heads"))
    num_fused, num_tokens = config.get("num_aux_hidden_states") or len(config[LAYER_IDS]), config["draft_vocab_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "fc": (width, num_fused * width),
        "norm": (width,),
        "lm_head": (num_tokens, width),
        **{f"{layer}.{name}": (width,) for name in ("hidden_norm", "input_layernorm", "post_attention_layernorm")},
        f"{layer}.self_attn.q_proj": (queries, 2 * width),
        f"{layer}.self_attn.k_proj": (keys, 2 * width),
        f"{layer}.self_attn.v_proj": (keys, 2 * width),
        f"{layer}.self_attn.o_proj": (width, queries),
        f"{layer}.mlp.gate_proj": (ffn_width, width),
        f"{layer}.mlp.up_proj": (ffn_width, width),
        f"{layer}.mlp.down_proj": (width, ffn_width),
    }
    if config["norm_before_fc"]:
        shapes["input_norm"] = (num_fused * width,)
    if config["fc_norm"]:
        shapes |= {f"fc_norm.{index}": (width,) for index in range(num_fused)}
    if has_embedding:
        shapes["embed_tokens"] = (vocab_size, width)
    specs = {f"{name}.weight": (shape, dtype) for name, shape in shapes.items()}
    if has_vocabulary or num_tokens < vocab_size:
        specs |= {"d2t": ((num_tokens,), torch.int64), "t2d": ((vocab_size,), torch.bool)}
    return specs


def check_vocabulary(tensors: dict[str, Tensor]) -> None:
    """Raises ValueError unless d2t, the offsets of draft tokens, and t2d, the mask of target tokens, agree."""
    if "d2t" not in tensors:
        return
    ids_W = tensors["d2t"] + torch.arange(len(tensors["d2t"]))
    if not torch.equal(ids_W, tensors["t2d"].nonzero()[:, 0]):
        raise ValueError("d2t and t2d of the head are not the same tokens in ascending order; train it again")


def _write(
    source: ExportSource,
    folder: Path,
    config: dict[str, Any],
    layer: str,
    *,
    with_embedding: bool = False,
    with_vocabulary: bool = False,
) -> None:
    tensors = tensors_of(source, layer, with_vocabulary=with_vocabulary)
    if with_embedding and not source.config.own_embedding:
        tensors["embed_tokens.weight"] = source.drafter.target.model.get_input_embeddings().weight
    check_vocabulary(tensors)
    has_embedding = with_embedding or source.config.own_embedding
    dtype = source.drafter.target.dtype
    specs = tensor_specs(config, layer, dtype, has_embedding=has_embedding, has_vocabulary=with_vocabulary)
    write_tensors(folder, tensors, specs)
    (folder / "config.json").write_text(json_text.text_of(config, indent=1) + "\n")


def _flags(source: ExportSource) -> dict[str, Any]:
    config = source.config
    return {
        "draft_vocab_size": config.draft_vocab or source.target_info.vocab_size,
        "norm_before_residual": config.norm_residual,
        "norm_before_fc": config.fusion_norm == "whole",
        "fc_norm": config.fusion_norm == "each",
        "norm_output": config.norm_output,
    }


def _layer(source: ExportSource) -> dict[str, Any]:
    """Returns the configuration of a Llama of one layer."""
    return decoder_config(source, model_type="llama", num_layers=1) | {"mlp_bias": False}


def _default_layers(source: ExportSource) -> tuple[int, ...]:
    """Returns the hidden layers that servers fuse by default, which depend on the target's number of blocks."""
    num_layers = source.target_info.num_layers
    return 2, num_layers // 2, num_layers - 3


WRITERS = {"vllm": vllm, "sglang": sglang, "speculators": speculators, "llama.cpp": llama_cpp, "openvino": openvino}
