"""Reads generation configs of transformers: what they change about decoding, and what cannot be done."""

import copy
import difflib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation import GenerationMode, LogitsProcessorList
from transformers.generation import stopping_criteria as criteria

from draftsmith.core.sampling import Sampling
from draftsmith.core.target import Target
from draftsmith.inputs.arguments import real_number, shown, token_ids, warn_of_unapplied_settings, whole_number
from draftsmith.inputs.batching import eos_ids
from draftsmith.inputs.processors import (
    NodeProcessors,
    RowProcessors,
    check_processors,
    for_rows,
    is_normalised,
    split_sampling,
)
from draftsmith.inputs.scores import KeptScores
from draftsmith.inputs.stopping import StopConditions, check_stop_strings
from draftsmith.inputs.texts import Text

MODEL = "model"
"""The name of the target's own generation config."""
FILE_NOTES = ("transformers_version", "_from_model_config")
"""Entries of a generation_config.json that are no settings."""
MODE_SETTINGS = (
    "penalty_alpha",
    "dola_layers",
    "prompt_lookup_num_tokens",
    "assistant_early_exit",
    "use_mtp",
    "constraints",
    "force_words_ids",
)
"""Settings of the generation config by which transformers chooses other decoding modes, beams apart."""
REAL_NUMBERS = (
    *("temperature", "top_p", "top_h", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "penalty_alpha"),
    *("repetition_penalty", "encoder_repetition_penalty", "guidance_scale", "max_time"),
)
WHOLE_NUMBERS = (
    *("top_k", "num_beams", "num_return_sequences", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size"),
    *("min_length", "min_new_tokens", "prompt_lookup_num_tokens"),
)
SWITCHES = (
    *("do_sample", "remove_invalid_values", "renormalize_logits", "return_dict_in_generate"),
    *("output_scores", "output_logits", "output_attentions", "output_hidden_states"),
)
"""Settings of the generation config that are read, by the kind of their values; transformers checks few of them."""
SHARES, CUTOFFS = ("top_p", "top_h", "min_p", "typical_p"), ("epsilon_cutoff", "eta_cutoff")
"""Settings that are at most 1, and below 1; transformers ignores some that are larger."""
TOKENS = ("suppress_tokens", "begin_suppress_tokens", "forced_bos_token_id", "forced_eos_token_id")
"""Settings that are token ids, which transformers does not compare with the vocabulary."""
MAX_COPIES = 65_536
"""Most rows of one prompt in a call."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Rules:
    """What decides about the next tokens of one call of `generate`, besides the target."""

    sampling: Sampling
    processors: NodeProcessors | None = None
    stops: StopConditions | None = None
    scores: KeptScores | None = None

    def cut(self, row: int, text: Text, path: list[int], new: list[int]) -> tuple[list[int], bool]:
        """Returns the `new` tokens of a row's text up to the first at which it stops, and whether one does.

        `path` are the nodes that the new tokens follow. Raises ValueError if the processors left no token at one of
        them.
        """
        kept, is_stopped = (new, False) if self.stops is None else self.stops.cut(text.ids, new)
        if self.processors is not None:
            self.processors.check(row, path[: len(kept)], text)
        if self.scores is not None:
            self.scores.keep(text.index, row, path[: len(kept)])
        return kept, is_stopped

    def is_out_of_time(self) -> bool:
        """Returns whether decoding must stop now."""
        return self.stops is not None and self.stops.is_out_of_time()


@dataclass(frozen=True, kw_only=True, eq=False)
class CallSettings:
    """The settings that `generate` and `generate_stream` have in common, checked."""

    config: GenerationConfig | None
    sampling: Sampling
    max_new_tokens: int
    eos: frozenset[int]
    batch_invariant: bool


def read_settings(
    target: Target,
    *,
    max_new_tokens: Any,
    temperature: Any,
    top_p: Any,
    top_k: Any,
    eos_token_id: Any,
    generation_config: Any,
    batch_invariant: bool | None,
) -> CallSettings:
    """Returns the settings of a call from its arguments; raises ValueError for invalid ones.

    Warns of settings of the model's own generation config where none is asked for.
    """
    if (config := read_config(target, generation_config)) is None:
        warn_of_unapplied_settings(target, stacklevel=4)
    elif config.token_healing:
        raise ValueError("token_healing is not supported: it changes the prompt; leave it out")
    sampling = with_sampling(
        config,
        None if temperature is None else real_number("temperature", temperature),
        None if top_p is None else real_number("top_p", top_p),
        None if top_k is None else whole_number("top_k", top_k),
    )
    return CallSettings(
        config=config,
        sampling=sampling,
        max_new_tokens=whole_number("max_new_tokens", max_new_tokens),
        eos=eos_ids(target, eos_token_id if eos_token_id is not None or config is None else config.eos_token_id),
        batch_invariant=target.batch_invariant if batch_invariant is None else batch_invariant,
    )


def check_mode(config: Any) -> None:
    """Rejects decoding modes that draftsmith does not have."""
    if config.num_beams not in (None, 1):
        raise ValueError(
            f"num_beams is {config.num_beams}; draftsmith decodes greedily or by sampling, so it must be 1"
        )
    mode = config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        settings = {name: getattr(config, name, None) for name in MODE_SETTINGS}
        given = ", ".join(f"{name}={value!r}" for name, value in settings.items() if value)
        raise ValueError(
            f"the generation config asks for {mode.value.replace('_', ' ')} ({given}), which draftsmith does not do; it"
            " decodes greedily or by sampling"
        )


def check_outputs(config: Any) -> None:
    """Rejects outputs that draftsmith does not have."""
    for name in ("output_attentions", "output_hidden_states"):
        if getattr(config, name, None):
            raise ValueError(f"{name} is not supported: verification runs on drafts, parts of which are rejected")


def check_names(settings: Mapping[str, Any]) -> None:
    """Raises ValueError for a name that no generation config has."""
    known = [name for name in vars(GenerationConfig()) if not name.startswith("_")]
    for name in settings:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, 1)
            raise ValueError(
                f"generation_config has no setting {name!r}{f'; did you mean {near[0]!r}?' if near else ''}"
            )


def check_values(settings: Mapping[str, Any]) -> None:
    """Raises ValueError for a setting of another type, a number that is not finite, or a negative one."""
    for name, value in settings.items():
        if value is None:
            continue
        if name in SWITCHES and not isinstance(value, bool):
            raise ValueError(f"{name} is {shown(value)}; it must be true or false")
        if name in REAL_NUMBERS or name in WHOLE_NUMBERS:
            number = real_number(name, value) if name in REAL_NUMBERS else whole_number(name, value)
            if number < 0:
                raise ValueError(f"{name} is {number}; it must not be negative")
            if (name in SHARES and number > 1) or (name in CUTOFFS and number >= 1):
                raise ValueError(f"{name} is {number}; it must be {'at most' if name in SHARES else 'below'} 1")


def parse_config(text: str) -> str | dict[str, Any] | None:
    """Returns what a flag means: "model", settings in JSON such as {"min_p": 0.1}, or the path of a JSON file.

    The empty text is None. Raises ValueError for anything else and for unknown names.
    """
    if text in ("", MODEL):
        return text or None
    try:
        found = json.loads(text if text.lstrip().startswith("{") else Path(text).read_text())
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(
            f"generation config {shown(text)} cannot be read ({reason}); it must be 'model', JSON such as"
            ' {"repetition_penalty": 1.1}, or a file of it'
        ) from error
    if not isinstance(found, dict):
        raise ValueError(f"generation config {shown(text)} holds {shown(found)}; it must hold settings by name")
    found = {name: value for name, value in found.items() if name not in FILE_NOTES}
    check_names(found)
    check_values(found)
    return found


def described(target: Target, given: str | dict[str, Any] | None) -> dict[str, Any]:
    """Returns the settings that a manifest records for `parse_config`'s result: those given, or the target's own."""
    if given is None or isinstance(given, dict):
        return given or {}
    own = target.model.generation_config.to_diff_dict()
    return {name: value for name, value in own.items() if name not in FILE_NOTES}


def read_config(target: Target, given: Any) -> GenerationConfig | None:
    """Returns the generation config that `generate(generation_config=)` means, its unset values filled in.

    "model" is the target's own, and a GenerationConfig is completed by it and by transformers' defaults, as in
    `model.generate`; a dictionary holds all settings that differ from neutral ones. Raises ValueError for anything
    else and for unknown names.
    """
    if given is None:
        return None
    if isinstance(given, Mapping):
        check_names(given)
        check_values(given)
        for name in TOKENS:
            ids = token_ids(name, given[name]) if given.get(name) is not None else []
            if wrong := [token for token in ids if not 0 <= token < target.vocab_size]:
                raise ValueError(f"{name} holds {wrong[0]}; the target's vocabulary has {target.vocab_size}")
        # A temperature means sampling, unless the dictionary says otherwise.
        is_sampling = isinstance(found := given.get("temperature"), int | float) and found > 0
        try:
            config = GenerationConfig(watermarking_config=given.get("watermarking_config"))
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"watermarking_config is {shown(given['watermarking_config'])}: {error}") from None
        for name, value in ({"do_sample": is_sampling} | dict(given)).items():
            if name != "watermarking_config":
                setattr(config, name, value)
        return config
    if isinstance(given, str) and given == MODEL:
        given = target.model.generation_config
    elif not isinstance(given, GenerationConfig):
        raise ValueError(
            f"generation_config is {shown(given)}; it must be 'model' for the target's own, a GenerationConfig, or a"
            " dictionary of its settings"
        )
    config = target.model._prepare_generation_config(copy.deepcopy(given))[0]
    check_values(vars(config))
    return config


def make_rules(
    target: Target,
    config: GenerationConfig | None,
    sampling: Sampling,
    prompts: Sequence[list[int]],
    rows: Sequence[list[int]],
    *,
    max_new_tokens: int,
    eos: frozenset[int],
    logits_processor: Any = None,
    stopping_criteria: Any = None,
    stop_strings: Any = None,
    output_scores: bool = False,
    output_logits: bool = False,
) -> Rules:
    """Returns the rules for continuing `rows`; `prompts` are the same ids, or an encoder-decoder's sources.

    `logits_processor` is one, a list, or `NodeProcessors`. With a generation config, `sampling` is that of
    `with_sampling`, and the config's processors come before a user's own, as in `model.generate`.
    Raises ValueError for what cannot be done with drafts.
    """
    is_ready = isinstance(logits_processor, NodeProcessors)
    found = own = [] if is_ready else check_processors(logits_processor)
    if config is not None:
        check_mode(config)
        check_outputs(config)
        output_scores, output_logits = (
            output_scores or bool(config.output_scores),
            output_logits or bool(config.output_logits),
        )
        found = check_processors(_built(target, config, prompts, rows, max_new_tokens, eos, own))
    is_normal = output_scores and is_normalised(found)
    if config is not None:
        found, sampling = split_sampling(found, is_sampling=not sampling.is_greedy)
    longest = max(map(len, rows))
    paddings = [longest - len(row) for row in rows]
    per_row = for_rows(found, paddings, prompts, unpadded=own, are_lengths_padded=False) if found else None
    processors = logits_processor if is_ready else NodeProcessors(per_row or [])
    stops = _stops(target, config, stopping_criteria, stop_strings)
    return Rules(
        sampling=sampling,
        processors=processors if processors else None,
        stops=StopConditions(stops, len(rows), target.device) if stops else None,
        scores=KeptScores(len(rows), sampling, scores=output_scores, logits=output_logits, normalise=is_normal)
        if output_scores or output_logits
        else None,
    )


def stream_rules(
    target: Target,
    settings: CallSettings,
    batch_size: int,
    *,
    logits_processor: Any = None,
    stopping_criteria: Any = None,
    stop_strings: Any = None,
) -> tuple[Rules, Callable[[int, list[int], list[int]], list[Any]]]:
    """Returns the rules of a stream, without processors, and a function that returns the processors of one text.

    It takes the number of the text's prompt, the ids it starts with, and the prompt. Raises ValueError for what cannot
    be done with drafts or in streams.
    """
    own, config, sampling = check_processors(logits_processor), settings.config, settings.sampling
    # By the length of a start, up to 2: transformers counts one token differently from more.
    made = dict.fromkeys((1, 2), RowProcessors(own, unpadded=own, are_lengths_padded=False))
    if config is not None:
        check_mode(config)
        check_outputs(config)
        if num_copies(config, sampling) > 1:
            raise ValueError(
                f"num_return_sequences is {config.num_return_sequences}; a stream has one text for each prompt, so pass"
                " the prompt several times"
            )
        if scores := [name for name in ("output_scores", "output_logits") if getattr(config, name, None)]:
            raise ValueError(f"{scores[0]} is not supported in streams, whose texts have no scores; leave it out")
        for length in made:
            start = [[0] * length]
            built = _built(target, config, start, start, settings.max_new_tokens, settings.eos, own)
            found, sampling = split_sampling(check_processors(built), is_sampling=not settings.sampling.is_greedy)
            made[length] = RowProcessors(found, unpadded=own, are_lengths_padded=False)

    def processors_of(index: int, start: list[int], prompt: list[int]) -> list[Any]:
        length = min(len(start), 2)
        return made[length].for_row(index, length - len(start), prompt)

    stops = _stops(target, config, stopping_criteria, stop_strings)
    conditions = StopConditions(stops, batch_size, target.device) if stops else None
    return Rules(sampling=sampling, stops=conditions), processors_of


def with_sampling(
    config: GenerationConfig | None, temperature: float | None, top_p: float | None, top_k: int | None
) -> Sampling:
    """Returns the settings of sampling, those that are None taken from `config`, which gets those that are not."""
    if config is None:
        return Sampling(temperature=temperature or 0.0, top_p=1.0 if top_p is None else top_p, top_k=top_k or 0)
    if temperature is not None:
        config.do_sample, config.temperature = temperature > 0, float(temperature)
    config.top_p = config.top_p if top_p is None else top_p
    config.top_k = config.top_k if top_k is None else top_k
    found = 1.0 if config.temperature is None else float(config.temperature)
    return Sampling(
        temperature=found if config.do_sample else 0.0,
        top_p=1.0 if config.top_p is None else float(config.top_p),
        top_k=int(config.top_k or 0),
    )


def num_copies(config: GenerationConfig | None, sampling: Sampling) -> int:
    """Returns the number of rows for each prompt; raises ValueError for several equal ones."""
    given = getattr(config, "num_return_sequences", None)
    number = whole_number("num_return_sequences", 1 if given is None else given)
    if not 1 <= number <= (1 if sampling.is_greedy else MAX_COPIES):
        raise ValueError(
            f"num_return_sequences is {number}; it must be 1, or at temperatures above 0 up to {MAX_COPIES:,}"
        )
    return number


def _built(
    target: Target,
    config: GenerationConfig,
    prompts: Sequence[list[int]],
    rows: Sequence[list[int]],
    max_new_tokens: int,
    eos: frozenset[int],
    own: list[Any],
) -> list[Any]:
    """Returns the processors that transformers builds for this config, for rows padded to the longest."""
    longest, device = max(map(len, rows)), target.device
    config = copy.deepcopy(config)
    config.max_length = longest + max_new_tokens
    config._eos_token_tensor = torch.tensor(sorted(eos), device=device) if eos else None
    if config.exponential_decay_length_penalty is not None and not eos:
        raise ValueError("exponential_decay_length_penalty needs an end-of-sequence token, and there is none")
    longest_prompt = max(map(len, prompts))
    sources = [prompt + [0] * (longest_prompt - len(prompt)) for prompt in prompts]
    try:
        return list(
            target.model._get_logits_processor(
                config,
                input_ids_seq_length=longest,
                encoder_input_ids=torch.tensor(sources, device=device),
                logits_processor=LogitsProcessorList(own),
                device=str(device),
                model_kwargs={},
            )
        )
    except Exception as error:  # of any kind, for values of another form: transformers checks few of them
        raise ValueError(f"the generation config cannot be used: {error}") from error


def _stops(target: Target, config: GenerationConfig | None, stopping_criteria: Any, stop_strings: Any) -> list[Any]:
    is_one = callable(stopping_criteria) and not isinstance(stopping_criteria, list)
    if not is_one and not isinstance(stopping_criteria, Iterable | None):
        raise ValueError(f"stopping_criteria is {shown(stopping_criteria)}; it must be a criterion or a list of them")
    stops = [stopping_criteria] if is_one else list(stopping_criteria or [])
    strings = stop_strings if stop_strings is not None else getattr(config, "stop_strings", None)
    if strings is not None:
        stops.append(check_stop_strings(strings, target.tokenizer))
    if (max_time := getattr(config, "max_time", None)) is not None:
        stops.append(criteria.MaxTimeCriteria(max_time=real_number("max_time", max_time)))
    return stops
