"""Exports DFlash drafters: a folder that vLLM and SGLang load, those of speculators and transformers, or GGUF files.

With a bias by the token before, a drafter is what engines call DSpark, and its confidence is written beside the bias.

The fused hidden layers are listed by the index of the block whose output they are, one less than draftsmith's numbers,
and in a folder of speculators by draftsmith's numbers.

Shape suffixes: W tokens of the shortlist.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from draftsmith.artifacts import json_text
from draftsmith.artifacts.published.dflash import DSPARK, TRANSFORMERS_TYPE, published_name
from draftsmith.export import custom_generate
from draftsmith.export.decoder_config import decoder_config
from draftsmith.export.launch import SAMPLES_DRAFTS, Launch, python_launch, sglang_launch, vllm_launch
from draftsmith.export.llama_cpp.draft_models import DRAFT_FILE
from draftsmith.export.llama_cpp.heads import check_hidden, is_plain_embedding
from draftsmith.export.llama_cpp.launch import llama_cpp_launch
from draftsmith.export.llama_cpp.models import INNER, layer_values, stretch_divisors
from draftsmith.export.llama_cpp.targets import drafter_kind, name_values, served_target
from draftsmith.export.models import CHAINS, FIXED
from draftsmith.export.openvino import HEAD_OPTIONS, check_options, openvino_launch
from draftsmith.export.openvino import check_hidden as check_openvino_hidden
from draftsmith.export.source import ExportSource
from draftsmith.export.tensors import Specs, write_tensors
from draftsmith.length import policies
from draftsmith.loading.gguf_contents import array, boolean, u32, write_gguf

BATCH_OF_ONE = (
    "transformers drafts for a batch of one only, and only from the second token on: the first step decodes plainly."
)
NO_CONFIDENCE = (
    "The confidence is left out, as engines read one beside a bias by the token before only (--markov-rank): the whole"
    " block is drafted."
)
WHOLE_BLOCK = "llama.cpp drafts the likeliest token of each position at every temperature, and the whole block."
ENDS_BEFORE = (
    "llama.cpp drafts the likeliest token of each position at every temperature, and ends a draft before the first"
    " token whose confidence is below --spec-draft-p-min; draftsmith ends it after that token."
)
DSPARK_IN_VLLM = "vLLM runs DSpark on GPUs only, by its second model runner."
READ_IN_VLLM = "vLLM 0.33.0, whose code was read and not run"
WHOLE_VOCABULARY = "transformers drafts from the whole vocabulary, whereas draftsmith drafts from the shortlist."


def transformers(source: ExportSource, folder: Path) -> Launch:
    """Writes a model that `generate(assistant_model=..., speculation_type="dflash")` drafts with.

    With a bias by the token before, which transformers does not add, it writes a folder for custom_generate.
    """
    if _is_dspark(source):
        return custom_generate.write(source, folder)
    _check_layers(source, "transformers")
    config = {"architectures": ["MuseGlimmerAssistantModel"], **_layer(source), **_block(source)}
    config |= {"model_type": TRANSFORMERS_TYPE, "target_layer_ids": _block_ids(source)}
    # In place of transformers' own defaults, which are of another vocabulary.
    config |= {
        name: getattr(source.generation_config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    # Unused by layers that see the whole text, and read nevertheless.
    config |= {"sliding_window": config.get("max_position_embeddings", 2**20)}
    _write(source, folder, config, in_transformers=True)
    notes = (BATCH_OF_ONE, *((WHOLE_VOCABULARY,) if source.config.shortlist else ()), *_notes(source))
    return python_launch(
        source,
        "from transformers import AutoModel",
        f"assistant = AutoModel.from_pretrained({str(source.output)!r}, dtype=model.dtype)",
        'model.generate(**inputs, assistant_model=assistant, speculation_type="dflash", max_new_tokens=64,'
        " do_sample=False)",
        notes=notes,
        assistant_model=str(source.output),
        speculation_type="dflash",
    )


def vllm(source: ExportSource, folder: Path) -> Launch:
    """Writes the folder that vLLM and SGLang load."""
    _check_layers(source, "vLLM", allows_last=True)
    _write(source, folder, flat_config(source))
    return _vllm_launch(source, _notes(source))


def sglang(source: ExportSource, folder: Path) -> Launch:
    """Writes the same folder, for a drafter of the whole vocabulary."""
    if source.config.shortlist:
        raise ValueError(
            "SGLang drafts from the whole vocabulary, and this drafter has a shortlist; export it --to vllm"
        )
    _check_layers(source, "SGLang")
    _write(source, folder, flat_config(source))
    settings = {"algorithm": "DSPARK" if _is_dspark(source) else "DFLASH", "draft-model-path": str(source.output)}
    return sglang_launch(source, settings | {"num-draft-tokens": source.config.block_size}, notes=_notes(source))


def openvino(source: ExportSource, folder: Path) -> Launch:
    """Writes the same folder, which optimum-intel converts, for a drafter of the whole vocabulary."""
    check_options(source)
    if source.config.shortlist:
        raise ValueError(
            "OpenVINO GenAI drafts from the whole vocabulary, and this drafter has a shortlist; export it --to vllm"
        )
    _check_no_bias(source, "OpenVINO GenAI")
    check_openvino_hidden(source, source.config.layers)
    _write(source, folder, flat_config(source))
    return openvino_launch(
        source,
        {"num_assistant_tokens": source.config.num_draft},
        conversion=HEAD_OPTIONS,
        caches_prefixes=False,
        notes=("OpenVINO GenAI runs DFlash for a batch of one, greedily.", *_notes(source)),
    )


def speculators(source: ExportSource, folder: Path) -> Launch:
    """Writes a folder of the speculators library, for further training and for vLLM."""
    _check_layers(source, "speculators", allows_last=True)
    _write(source, folder, nested_config(source))
    notes = _notes(source)
    if source.verifier_name != source.target_name:
        notes += (
            f"config.json names the verifier {source.verifier_name!r}, relative to this folder: run speculators in this"
            " folder, or export with --target-name and the folder or hub name where the verifier is then.",
        )
    return _vllm_launch(source, notes)


def llama_cpp(source: ExportSource, folder: Path) -> Launch:
    """Writes the layers as a GGUF file beside the target's.

    llama.cpp numbers hidden layers as draftsmith does, and rotates the halves of a head as transformers does.
    """
    config, target_info, name = source.config, source.target_info, "dflash"
    served = served_target(source)
    check_hidden(served, config.layers, target_info.num_layers)
    drafter = source.drafter
    embedding = drafter.target.model.get_input_embeddings()
    if not is_plain_embedding(embedding):
        raise ValueError(
            f"{source.target_name} scales its embedding, and llama.cpp's DFlash layers read it without; export it --to"
            " vllm"
        )
    tensors = {_llama_cpp_name(published): tensor for published, tensor in _published(source).items()}
    if config.shortlist:
        ids_W = drafter.shared_head.shortlist.ids_W
        tensors |= {"output.weight": drafter.target.model.get_output_embeddings().weight[ids_W], "d2t": ids_W}
    if config.stretch:
        tensors["rope_freqs.weight"] = stretch_divisors(config.head_width, config.theta, config.stretch)
    values = {
        **name_values(str(source.artifact)),
        **layer_values(
            name,
            context=target_info.context_length,
            width=target_info.hidden_size,
            num_blocks=config.num_layers,
            inner_width=config.inner_width,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_width=config.head_width,
            theta=config.theta,
            eps=config.eps,
        ),
        f"{name}.target_layers": array(list(config.layers), "INT32"),
        f"{name}.block_size": u32(config.block_size),
        f"{name}.attention.causal": boolean(False),
        **({f"{name}.sample_from_anchor": boolean(False)} if _is_dspark(source) else {}),
        **({f"{name}.has_confidence_head": boolean(config.confidence)} if _is_dspark(source) else {}),
        **served.tokenizer,
        "tokenizer.ggml.mask_token_id": u32(config.mask_token),
    }
    write_gguf(folder / DRAFT_FILE, name, values, tensors, drafter_kind(source, drafter.target.dtype))
    served.write(folder)
    # A lower limit would shorten the block, whose tokens attend to those after them.
    settings: dict[str, Any] = {"spec-draft-model": str(source.output / DRAFT_FILE)}
    settings["spec-draft-n-max"] = config.block_size - 1
    kind, notes = "draft-dspark" if _is_dspark(source) else "draft-dflash", (*_notes(source), WHOLE_BLOCK)
    policy = policies.make(config.length)
    if _is_dspark(source) and config.confidence and isinstance(policy, policies.Confidence):
        settings, notes = settings | {"spec-draft-p-min": policy.threshold}, (ENDS_BEFORE,)
    return llama_cpp_launch(served, kind, settings, notes=notes)


def _llama_cpp_name(published: str) -> str:
    """Returns llama.cpp's name of a weight, given that of a folder for vLLM."""
    outer = {"fc": "fc", "hidden_norm": "enc.output_norm", "norm": "output_norm", "confidence_head.proj": "conf_proj"}
    outer |= {f"markov_head.{one}": one for one in ("markov_w1", "markov_w2")}
    module, _, kind = published.rpartition(".")
    number, _, inner = module.removeprefix("layers.").partition(".")
    return f"blk.{number}.{INNER[inner]}.{kind}" if module.startswith("layers.") else f"{outer[module]}.{kind}"


def flat_config(source: ExportSource) -> dict[str, Any]:
    """Returns the configuration that vLLM and SGLang read, with every flag explicit."""
    own = {"mask_token_id": source.config.mask_token, "target_layer_ids": _block_ids(source)}
    # DSpark's loaders read these beside the layers' settings, DFlash's below them.
    heads = own | _heads(source) | {"sample_from_anchor": False} if _is_dspark(source) else {}
    return {
        "architectures": ["Qwen3DSparkModel" if heads else "DFlashDraftModel"],
        **_layer(source),
        **heads,
        "draft_vocab_size": source.config.shortlist or source.target_info.vocab_size,
        "block_size": source.config.block_size,
        "num_target_layers": source.target_info.num_layers,
        "target_hidden_size": source.target_info.hidden_size,
        "is_causal": False,
        "dflash_config": own | {"causal": False, "use_swa": False, "sample_from_anchor": False},
    }


def nested_config(source: ExportSource) -> dict[str, Any]:
    """Returns the configuration of the speculators library."""
    proposal = {"proposal_type": "greedy", "speculative_tokens": source.config.num_draft}
    kind = DSPARK if _is_dspark(source) else "dflash"
    return {
        "speculators_model_type": kind,
        "speculators_version": "0.9.0",
        "architectures": ["DSparkDraftModel" if kind == DSPARK else "DFlashDraftModel"],
        **(_heads(source) if kind == DSPARK else {}),
        **_block(source),
        "draft_vocab_size": source.config.shortlist or source.target_info.vocab_size,
        "target_hidden_size": None,
        "aux_hidden_state_layer_ids": list(source.config.layers),
        # Without it vLLM lets a block's tokens see the ones before them only, whatever the kind of layer.
        "sliding_window_non_causal": True,
        "sample_from_anchor": False,
        "dtype": str(source.drafter.target.dtype).removeprefix("torch."),
        "speculators_config": {
            "algorithm": kind,
            "default_proposal_method": "greedy",
            "proposal_methods": [proposal | {"verifier_accept_k": 1, "accept_tolerance": 0.0}],
            "verifier": {"name_or_path": source.verifier_name, "architectures": source.target_config.architectures},
        },
        "transformer_layer_config": _layer(source),
    }


def tensor_specs(config: dict[str, Any], dtype: torch.dtype, *, in_transformers: bool = False) -> Specs:
    """Returns the tensors that loaders expect for a drafter with this config.json, derived from that alone."""
    inner = config.get("transformer_layer_config", config)
    width, ffn_width, head_width = inner["hidden_size"], inner["intermediate_size"], inner["head_dim"]
    queries, keys = (inner[name] * head_width for name in ("num_attention_heads", "num_key_value_heads"))
    ids = config.get("aux_hidden_state_layer_ids") or {**config, **config.get("dflash_config", {})}["target_layer_ids"]
    shapes: dict[str, tuple[int, ...]] = {
        "encoder.fc" if in_transformers else "fc": (width, len(ids) * width),
        "encoder.output_norm_enc" if in_transformers else "hidden_norm": (width,),
        "norm": (width,),
    }
    for number in range(inner["num_hidden_layers"]):
        layer = {
            "input_layernorm": (width,),
            "post_attention_layernorm": (width,),
            "self_attn.q_proj": (queries, width),
            "self_attn.k_proj": (keys, width),
            "self_attn.v_proj": (keys, width),
            "self_attn.o_proj": (width, queries),
            "self_attn.q_norm": (head_width,),
            "self_attn.k_norm": (head_width,),
            "mlp.gate_proj": (ffn_width, width),
            "mlp.up_proj": (ffn_width, width),
            "mlp.down_proj": (width, ffn_width),
        }
        shapes |= {f"layers.{number}.{name}": shape for name, shape in layer.items()}
    num_tokens, vocab_size = config.get("draft_vocab_size", inner["vocab_size"]), inner["vocab_size"]
    if num_tokens < vocab_size:
        shapes["lm_head"] = (num_tokens, width)
    if rank := config.get("markov_rank", 0):
        shapes |= {"markov_head.markov_w1": (vocab_size, rank), "markov_head.markov_w2": (num_tokens, rank)}
    specs = {f"{name}.weight": (shape, dtype) for name, shape in shapes.items()}
    if config.get("enable_confidence_head"):
        specs |= {
            "confidence_head.proj.weight": ((1, width + rank), dtype),
            "confidence_head.proj.bias": ((1,), dtype),
        }
    if num_tokens < vocab_size:
        specs |= {"d2t": ((num_tokens,), torch.int64), "t2d": ((vocab_size,), torch.bool)}
    return specs


def _write(source: ExportSource, folder: Path, config: dict[str, Any], *, in_transformers: bool = False) -> None:
    drafter, dtype = source.drafter, source.drafter.target.dtype
    tensors = _published(source, in_transformers=in_transformers)
    if source.config.shortlist and not in_transformers:
        tensors |= _vocabulary(drafter)
    write_tensors(folder, tensors, tensor_specs(config, dtype, in_transformers=in_transformers))
    (folder / "config.json").write_text(json_text.text_of(config, indent=1) + "\n")


def _published(source: ExportSource, *, in_transformers: bool = False) -> dict[str, Tensor]:
    """Returns the drafter's weights by their published names; without a bias, the confidence is left out."""
    weights = source.drafter.state_dict()
    weights.pop("shared_head.shortlist.ids_W", None)
    if not _is_dspark(source):
        weights = {name: tensor for name, tensor in weights.items() if not name.startswith("confidence.")}
    return {published_name(name, in_transformers=in_transformers): tensor for name, tensor in weights.items()}


def _is_dspark(source: ExportSource) -> bool:
    """Returns whether engines have to run the drafter as DSpark: slots depend on the token before."""
    return source.config.markov_rank > 0


def _heads(source: ExportSource) -> dict[str, Any]:
    """Returns the settings of DSpark's heads."""
    return {
        "markov_rank": source.config.markov_rank,
        "markov_head_type": "vanilla",
        "enable_confidence_head": source.config.confidence,
        "confidence_head_with_markov": source.config.confidence,
    }


def _check_no_bias(source: ExportSource, engine: str) -> None:
    """Raises ValueError for a bias by the token before, which some engines do not add."""
    if _is_dspark(source):
        raise ValueError(
            f"{engine} drafts a block's tokens independently of each other, and this drafter has a bias by the token"
            f" before (--markov-rank {source.config.markov_rank}); export it --to vllm, sglang, speculators,"
            " llama.cpp or transformers, or train one without"
        )


def _vocabulary(drafter: Any) -> dict[str, Tensor]:
    """Returns the head's rows for the shortlist, and both maps between it and the vocabulary."""
    ids_W = drafter.shared_head.shortlist.ids_W
    is_listed_V = torch.zeros(drafter.target.vocab_size, dtype=torch.bool, device=ids_W.device)
    return {
        "lm_head.weight": drafter.target.model.get_output_embeddings().weight[ids_W],
        "d2t": ids_W - torch.arange(len(ids_W), device=ids_W.device),
        "t2d": is_listed_V.index_fill(0, ids_W, True),
    }


def _layer(source: ExportSource) -> dict[str, Any]:
    """Returns the configuration of a Qwen3 of these layers, with the target's vocabulary."""
    num_layers = source.config.num_layers
    layer_types = ["full_attention"] * num_layers
    return decoder_config(source, model_type="qwen3", num_layers=num_layers) | {"layer_types": layer_types}


def _block(source: ExportSource) -> dict[str, Any]:
    return {"block_size": source.config.block_size, "mask_token_id": source.config.mask_token}


def _block_ids(source: ExportSource) -> list[int]:
    """Returns the indices of the blocks whose outputs are fused."""
    return [layer - 1 for layer in source.config.layers]


def _vllm_launch(source: ExportSource, notes: tuple[str, ...]) -> Launch:
    is_dspark = _is_dspark(source)
    settings: dict[str, Any] = {"method": DSPARK if is_dspark else "dflash", "model": str(source.output)}
    settings |= {"num_speculative_tokens": source.config.num_draft} | SAMPLES_DRAFTS
    if not is_dspark:
        return vllm_launch(source, settings, notes=notes)
    return vllm_launch(source, settings, checked_with=READ_IN_VLLM, notes=(*notes, DSPARK_IN_VLLM))


def _check_layers(source: ExportSource, engine: str, *, allows_last: bool = False) -> None:
    """Raises ValueError for the embedding's output, and for that of the last block, which some engines norm."""
    layers, num_layers = source.config.layers, source.target_info.num_layers
    if layers[0] == 0 or (layers[-1] == num_layers and not allows_last):
        most = "blocks" if allows_last else "blocks but the last"
        raise ValueError(
            f"{engine} supports the outputs of all {most}, and this drafter reads hidden layers {list(layers)} of"
            f" {num_layers}; train one on others (--layers)"
        )


def _notes(source: ExportSource) -> tuple[str, ...]:
    without = (NO_CONFIDENCE,) if source.config.confidence and not _is_dspark(source) else ()
    if source.config.num_nodes:
        return (CHAINS, *without)
    return (FIXED, *without) if source.config.length != "fixed" else without


WRITERS = {
    "transformers": transformers,
    "vllm": vllm,
    "sglang": sglang,
    "speculators": speculators,
    "llama.cpp": llama_cpp,
    "openvino": openvino,
}
