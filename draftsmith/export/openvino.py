"""Exports for OpenVINO GenAI: a transformers folder, the commands that convert it, and the Python that runs it.

optimum-intel converts the folders that vLLM loads, and the target, to OpenVINO's files. Both run in an environment of
their own, as optimum-intel requires an older transformers.
"""

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from draftsmith.export.launch import Launch
from draftsmith.export.models import CHAINS, FIXED, ModelFactory, write_model
from draftsmith.export.source import ExportSource
from draftsmith.loading import remote_code

CONVERTED_DRAFT, CONVERTED_TARGET = "openvino/draft", "openvino/target"
"""Subfolders that the commands write."""
MODEL_FILE = "openvino_model.xml"
FORMATS = ("fp32", "fp16", "int8", "int4")
"""Formats of weights that optimum-intel writes: its `--weight-format`."""
HEAD_OPTIONS = ("--trust-remote-code", "--disable-convert-tokenizer")
"""Arguments with which optimum-intel converts heads, by its own modelling code."""
EXACT = {"KV_CACHE_PRECISION": "f32", "INFERENCE_PRECISION_HINT": "f32"}
"""Settings with which OpenVINO computes as torch does in float32."""
LIKELIEST = "OpenVINO GenAI was checked with greedy decoding only."
ROUNDED = (
    "KV_CACHE_PRECISION and INFERENCE_PRECISION_HINT make the text that of torch in float32. Without them CPUs keep"
    " keys and values in 8 bits and compute in bfloat16 where they can: the text then agrees with that of torch, and"
    " with that of plain decoding, up to rounding only."
)
READS_HIDDEN = ("llama", "mistral", "qwen2", "qwen3")
"""Types of targets whose blocks end as OpenVINO expects where it looks for hidden states: x + W(f(x) * g(x))."""


def check_options(source: ExportSource) -> None:
    """Raises ValueError, before weights load, for a format that is not written or a folder that is no target."""
    for option, value in (("--quantise", source.quantise), ("--quantise-target", source.quantise_target)):
        if value and value not in FORMATS:
            raise ValueError(f"{option} is {value!r}; for OpenVINO GenAI it must be one of {', '.join(FORMATS)}")
    given = source.target_name_there
    if not given:
        return
    if source.quantise_target or source.manifest.get("tunes_target"):
        why = "--quantise-target converts one" if source.quantise_target else "the drafter has fine-tuned its target"
        raise ValueError(f"--target-name is {given!r}, and {why}; drop one of the two")
    folder = Path(given)
    if not (folder / MODEL_FILE).is_file():
        raise ValueError(f"--target-name is {given!r}; for OpenVINO GenAI it must be a folder with {MODEL_FILE}")
    found = json.loads((folder / "config.json").read_text()) if (folder / "config.json").is_file() else {}
    info = source.target_info
    for key, expected in (("hidden_size", info.hidden_size), ("num_hidden_layers", info.num_layers)):
        value = found.get("text_config", found).get(key)
        if value != expected:
            raise ValueError(
                f"{given}: {key} is {value}, and target {source.target_name} has {expected}; name a folder converted"
                " from that target"
            )


def check_hidden(source: ExportSource, layers: tuple[int, ...]) -> None:
    """Raises ValueError if OpenVINO does not give these hidden layers of the target to a drafter."""
    kind = source.target_config.model_type
    if kind not in READS_HIDDEN:
        raise ValueError(
            f"OpenVINO GenAI is known to find hidden states of {', '.join(READS_HIDDEN)} targets, and"
            f" {source.target_name} is of type {kind!r}; export a draft model (./launch.sh distill) instead, or run the"
            " drafter with draftsmith"
        )
    if layers[0] == 0:
        raise ValueError(
            f"OpenVINO GenAI reads the outputs of blocks, and this drafter the hidden layers {list(layers)}, of which 0"
            " is the embedding; train one on others (--layers)"
        )


def openvino_launch(
    source: ExportSource,
    settings: dict[str, Any],
    *,
    conversion: tuple[str, ...] = (),
    rt_info: dict[str, str] | None = None,
    caches_prefixes: bool = True,
    notes: tuple[str, ...] = (),
) -> Launch:
    """Returns the commands that convert an export and the Python that runs it.

    `settings` are those of each call of `generate`, and those of the pipeline of a look-up; `conversion` has further
    arguments for the drafter's conversion, and `rt_info` entries that are added to the converted drafter.
    """
    has_model = "prompt_lookup" not in settings
    given = source.target_name_there
    target = str(Path(given).resolve() if given else source.output / CONVERTED_TARGET)
    commands = []
    if not given:
        trust = ("--trust-remote-code",) if remote_code.is_allowed() else ()
        commands.append(_convert(source.served_model, source.quantise_target, target, trust))
    pipeline = [repr(target), '"CPU"']
    draft = ""
    if has_model:
        draft = str(source.output / CONVERTED_DRAFT)
        commands.append(_convert(str(source.output), source.quantise, draft, conversion))
        commands += [_add_rt_info(draft, name, value) for name, value in (rt_info or {}).items()]
        pipeline.append(f'draft_model=openvino_genai.draft_model({draft!r}, "CPU", **exact)')
    else:
        pipeline.append("prompt_lookup=True")
    lines = ["import openvino_genai", f"exact = {EXACT!r}"]
    if not caches_prefixes:
        lines += ["scheduler = openvino_genai.SchedulerConfig()", "scheduler.enable_prefix_caching = False"]
        pipeline.append("scheduler_config=scheduler")
    arguments = {name: value for name, value in settings.items() if name != "prompt_lookup"}
    options = "".join(f", {name}={value}" for name, value in arguments.items())
    lines += [
        f'pipeline = openvino_genai.LLMPipeline({", ".join(pipeline)}, ATTENTION_BACKEND="PA", **exact)',
        f'print(pipeline.generate("some text", max_new_tokens=64, do_sample=False{options}))',
    ]
    return Launch(
        command="\n".join(lines),
        convert="\n".join(commands),
        target=target,
        settings=({"draft_model": draft} if has_model else {}) | settings,
        notes=(*notes, LIKELIEST, ROUNDED),
    )


def draft_model_writer(make_model: ModelFactory, *notes: str) -> Callable[[ExportSource, Path], Launch]:
    """Returns a writer of `make_model`'s model as a draft model of OpenVINO GenAI."""

    def write(source: ExportSource, folder: Path) -> Launch:
        check_options(source)
        write_model(source, folder, make_model(source))
        config = source.config
        shape = (CHAINS,) if not config.supports_early_stop else ()
        length = (FIXED,) if config.supports_early_stop and config.length != "fixed" else ()
        return openvino_launch(source, {"num_assistant_tokens": config.num_draft}, notes=(*notes, *shape, *length))

    return write


def _convert(model: str, weight_format: str, output: str, options: tuple[str, ...]) -> str:
    words = ["optimum-cli", "export", "openvino", "-m", model, "--task", "text-generation-with-past"]
    return shlex.join([*words, "--weight-format", weight_format or FORMATS[0], *options, output])


def _add_rt_info(folder: str, name: str, value: str) -> str:
    """Returns the command that adds an entry to a converted model, whose weights are read before they are replaced."""
    file = json.dumps(str(Path(folder) / MODEL_FILE))  # as JSON, so that no single quote needs an escape in the shell
    code = (
        f'import openvino; core = openvino.Core(); core.set_property({{"ENABLE_MMAP": False}});'
        f" model = core.read_model({file}); model.set_rt_info({json.dumps(value)}, [{json.dumps(name)}]);"
        f" openvino.save_model(model, {file}, compress_to_fp16=False)"
    )
    return shlex.join(["python", "-c", code])
