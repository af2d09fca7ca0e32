"""Applies transformers' logits processors to every node of a draft, each to its own prefix.

A node's prefix is its row's committed tokens, without padding, and the draft's tokens down to the node: what
`model.generate` would pass if that text were generated. The processed logits are the target's from then on, so that
verification is lossless for them; drafts ignore processors and are accepted less often where those change much.

Shape suffixes: B rows, N nodes, V vocabulary, D levels of a tree, L longest row, W longest prefix; X nodes of running
rows.
"""

import copy
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.generation import logits_process as hf

from draftsmith.core.sampling import Sampling
from draftsmith.core.tree import Draft
from draftsmith.inputs.arguments import shown
from draftsmith.inputs.texts import Text

REFUSED = {
    "UnbatchedClassifierFreeGuidanceLogitsProcessor": "runs the model on another prompt for each token",
    "ClassifierFreeGuidanceLogitsProcessor": "reads the logits of a second, unconditional row",
    "SynthIDTextWatermarkLogitsProcessor": "keeps the tokens of the calls before",
    "WhisperTimeStampLogitsProcessor": "is for speech",
    "WhisperNoSpeechDetection": "is for speech",
    "AlternatingCodebooksLogitsProcessor": "is for speech",
    "BarkEosPrioritizerLogitsProcessor": "is for speech",
    "DiaClassifierFreeGuidanceLogitsProcessor": "is for speech",
    "DiaEOSChannelFilterLogitsProcessor": "is for speech",
    "DiaEOSDelayPatternLogitsProcessor": "is for speech",
}
"""Processors of transformers that cannot be applied to drafted prefixes, with what they do."""
ANY_LENGTH = (
    hf.RepetitionPenaltyLogitsProcessor,
    hf.NoRepeatNGramLogitsProcessor,
    hf.SequenceBiasLogitsProcessor,
    hf.NoBadWordsLogitsProcessor,
    hf.SuppressTokensLogitsProcessor,
    hf.InfNanRemoveLogitsProcessor,
    hf.LogitNormalization,
    hf.TemperatureLogitsWarper,
    hf.TopKLogitsWarper,
    hf.TopPLogitsWarper,
    hf.TopHLogitsWarper,
    hf.MinPLogitsWarper,
    hf.TypicalLogitsWarper,
    hf.EpsilonLogitsWarper,
    hf.EtaLogitsWarper,
)
"""Processors that do not depend on the prefix's length: one call for prefixes padded left with an id that no token
has."""
LENGTHS = {
    hf.MinLengthLogitsProcessor: "min_length",
    hf.MinNewTokensLengthLogitsProcessor: "prompt_length_to_skip",
    hf.ForcedEOSTokenLogitsProcessor: "max_length",
    hf.ExponentialDecayLengthPenalty: "regulation_start",
    hf.SuppressTokensAtBeginLogitsProcessor: "begin_index",
}
"""The attribute in which a processor keeps a length that includes the padding of a batch."""
CUTOFFS: dict[type, tuple[str, str]] = {
    hf.TemperatureLogitsWarper: ("temperature", "temperature"),
    hf.TopKLogitsWarper: ("top_k", "top_k"),
    hf.TopPLogitsWarper: ("top_p", "top_p"),
    hf.MinPLogitsWarper: ("min_p", "min_p"),
    hf.TypicalLogitsWarper: ("typical_p", "mass"),
    hf.EpsilonLogitsWarper: ("epsilon_cutoff", "epsilon"),
    hf.EtaLogitsWarper: ("eta_cutoff", "epsilon"),
}
"""The setting of `Sampling` that a processor is, and its attribute, in the order in which both apply them."""


def check_processors(processors: Any) -> list[Any]:
    """Returns one processor or a list as a list; raises ValueError for what cannot be applied to drafted prefixes."""
    if not callable(processors) and not isinstance(processors, Iterable | None):
        raise ValueError(f"logits_processor is {shown(processors)}; it must be a logits processor or a list of them")
    found = [processors] if callable(processors) and not isinstance(processors, list) else list(processors or [])
    for processor in found:
        name = type(processor).__name__
        if not callable(processor):
            raise ValueError(f"logits processor {name} cannot be called with (input_ids, scores)")
        if reason := REFUSED.get(name):
            raise ValueError(
                f"logits processor {name} is not supported: it {reason}, but draftsmith applies processors to the"
                " prefixes of drafted tokens, which may be rejected; leave it out"
            )
    return found


def split_sampling(processors: Sequence[Any], *, is_sampling: bool) -> tuple[list[Any], Sampling]:
    """Returns the processors that depend on prefixes, and the settings of sampling that follow them.

    The longest end of the list that applies `Sampling`'s settings in its order becomes them, so that drafters sample
    with the same; all that comes before is applied to the logits.
    """
    rest = [one for one in processors if not isinstance(one, hf.LogitNormalization)]
    if not is_sampling:
        return rest, Sampling(temperature=0.0)
    kinds, settings = list(CUTOFFS), {"temperature": 1.0}
    latest = len(kinds)
    while rest and type(rest[-1]) in CUTOFFS and kinds.index(type(rest[-1])) < latest:
        if getattr(rest[-1], "min_tokens_to_keep", 1) > 1 or getattr(rest[-1], "filter_value", -torch.inf) > -torch.inf:
            break
        processor = rest.pop()
        latest = kinds.index(type(processor))
        name, attribute = CUTOFFS[type(processor)]
        settings[name] = type(getattr(Sampling, name))(getattr(processor, attribute))
    return rest, Sampling(**settings)  # type: ignore[arg-type]


def warpers_of(sampling: Sampling) -> list[Any]:
    """Returns transformers' processors that apply the settings of sampling to scores, in their order."""
    values = {kind: getattr(sampling, name) for kind, (name, _) in CUTOFFS.items()}
    return [kind(value) for kind, value in values.items() if value != getattr(Sampling, CUTOFFS[kind][0])]


def is_normalised(processors: Sequence[Any]) -> bool:
    """Returns whether the processors end with transformers' normalisation of scores.

    Raises ValueError if it comes earlier, as it does not change the distribution and is left out.
    """
    *before, last = [None, *(isinstance(one, hf.LogitNormalization) for one in processors)]
    if any(before):
        raise ValueError("output_scores is not supported with LogitNormalization before other processors; put it last")
    return bool(last)


def for_rows(
    processors: Sequence[Any],
    paddings: Sequence[int],
    sources: Sequence[list[int]],
    *,
    unpadded: Sequence[Any] = (),
    are_lengths_padded: bool,
) -> list[list[Any]]:
    """Returns each row's processors, made for a padded batch, as they are for the row alone without its padding.

    `paddings` are the rows' numbers of padding tokens and `sources` their prompts, or an encoder-decoder's sources.
    Those in `unpadded` stay as they are; `are_lengths_padded` says whether a `min_length` counts padding.
    """
    made = RowProcessors(processors, unpadded=unpadded, are_lengths_padded=are_lengths_padded)
    return [made.for_row(row, *given) for row, given in enumerate(zip(paddings, sources, strict=True))]


class RowProcessors:
    """Makes the processors of single rows from those of a padded batch; rows share what is the same for them.

    The arguments are those of `for_rows`.
    """

    def __init__(self, processors: Sequence[Any], *, unpadded: Sequence[Any] = (), are_lengths_padded: bool) -> None:
        self._processors = processors
        self._unpadded = {id(one) for one in unpadded}
        self._are_lengths_padded = are_lengths_padded
        self._copies: dict[tuple[int, int], Any] = {}

    def for_row(self, row: int, padding: int, source: list[int]) -> list[Any]:
        """Returns the processors of a row with `padding` padding tokens, negative if it is longer than the batch."""
        return [self._for_row(processor, row, padding, source) for processor in self._processors]

    def _for_row(self, processor: Any, row: int, padding: int, source: list[int]) -> Any:
        kind = type(processor)
        if kind is hf.EncoderRepetitionPenaltyLogitsProcessor:
            return kind(1 / processor.penalty, torch.tensor([source], device=processor.encoder_input_ids.device))
        if kind is hf.EncoderNoRepeatNGramLogitsProcessor:
            return kind(processor.ngram_size, torch.tensor([source]))
        if kind is hf.PrefixConstrainedLogitsProcessor:
            allowed = processor._prefix_allowed_tokens_fn
            return kind(lambda _, prefix: allowed(row, prefix), 1)
        if id(processor) in self._unpadded:
            padding = 0
        if kind is hf.RepetitionPenaltyLogitsProcessor and processor.prompt_ignore_length is not None:
            given = processor.prompt_ignore_length
            if isinstance(given, Tensor) and row >= len(given):
                raise ValueError(
                    f"prompt_ignore_length of RepetitionPenaltyLogitsProcessor has an entry for {len(given)} rows, none"
                    f" for row {row}; pass one for each, or a number"
                )
            ignored = max((int(given[row]) if isinstance(given, Tensor) else given) - padding, 0)
            return self._copy(processor, ignored, lambda: kind(processor.penalty, ignored or None))
        if padding and kind in LENGTHS and (self._are_lengths_padded or kind is not hf.MinLengthLogitsProcessor):
            return self._copy(processor, padding, lambda: _shifted(processor, padding))
        return processor

    def _copy(self, processor: Any, key: int, make: Callable[[], Any]) -> Any:
        if (id(processor), key) not in self._copies:
            self._copies[id(processor), key] = make()
        return self._copies[id(processor), key]


def _shifted(processor: Any, padding: int) -> Any:
    """Returns a copy of a processor whose length counts `padding` tokens fewer."""
    made, name = copy.copy(processor), LENGTHS[type(processor)]
    setattr(made, name, max(getattr(processor, name) - padding, 0))
    return made


class NodeProcessors:
    """The logits processors of one call of `generate`: a list for each row, of the same kinds in all rows."""

    def __init__(self, of_rows: Sequence[Sequence[Any]]) -> None:
        self._of_rows = of_rows
        self._dead: list[list[bool]] | None = None
        self._checked: set[int] = set()

    def __bool__(self) -> bool:
        return any(self._of_rows)

    def change_rows(self, origins: Sequence[int | None], new: Sequence[Sequence[Any]]) -> None:
        """Follows a batch whose rows come and go: row i is now what row `origins[i]` was, or for None the next new."""
        added = iter(new)
        self._of_rows = [next(added) if origin is None else self._of_rows[origin] for origin in origins]

    def __call__(
        self, logits_BNV: Tensor, draft: Draft, rows: Sequence[list[int]], is_running: Sequence[bool]
    ) -> Tensor:
        """Returns the processed logits in float32 (float64 for float64 logits), those of finished rows unchanged.

        `rows` are the committed ids, the pending one last. Where processors leave no token the logits stay as they are,
        for `check` to find: such a node may lie beyond what is committed.
        """
        logits_BNV = logits_BNV.to(torch.promote_types(logits_BNV.dtype, torch.float32))
        live = [row for row, runs in enumerate(is_running) if runs]
        num_nodes, device = draft.tree.num_nodes, logits_BNV.device
        depths = draft.tree.depths_RN.expand(len(rows), -1).tolist()
        lengths_X = [len(rows[row]) + depth for row in live for depth in depths[row]]
        prefixes_XW = _prefixes(draft, [rows[row] for row in live], live, logits_BNV.shape[-1])
        live_B = torch.tensor(live, device=device)
        raw_XV = logits_BNV[live_B].flatten(0, 1)
        scores_XV = raw_XV.clone()
        for at, kind in enumerate(map(type, self._of_rows[0])):
            of_live = [self._of_rows[row][at] for row in live]
            if kind in ANY_LENGTH and all(one is of_live[0] for one in of_live):
                scores_XV = self._call(of_live[0], prefixes_XW, scores_XV)
                continue
            groups: dict[tuple[int, int], list[int]] = defaultdict(list)
            for index, length in enumerate(lengths_X):
                groups[length, id(of_live[index // num_nodes])].append(index)
            # Shortest first: a processor that remembers its first call, to know the prompt's length, sees the prompt.
            for (length, _), members in sorted(groups.items()):
                processor = of_live[members[0] // num_nodes]
                if len(members) == len(lengths_X):
                    scores_XV = self._call(processor, prefixes_XW[:, -length:], scores_XV)
                    continue
                index_X = torch.tensor(members, device=device)
                scores_XV[index_X] = self._call(processor, prefixes_XW[index_X, -length:], scores_XV[index_X])
        largest_X, largest_raw_X = scores_XV.amax(-1), raw_XV.amax(-1)
        if bool(((largest_X.isnan() | largest_X.isposinf()) & largest_raw_X.isfinite()).any()):
            names = ", ".join(dict.fromkeys(map(_name, self._of_rows[0])))
            raise ValueError(
                f"the logits processors ({names}) return scores that are NaN or infinite; check their settings"
            )
        is_dead_X = largest_X.isneginf() & ~largest_raw_X.isneginf()
        self._dead = None
        if bool(is_dead_X.any()):
            scores_XV = torch.where(is_dead_X[:, None], raw_XV, scores_XV)
            is_dead_BN = torch.zeros(logits_BNV.shape[:2], dtype=torch.bool, device=device)
            is_dead_BN[live_B] = is_dead_X.view(len(live), num_nodes)
            self._dead = is_dead_BN.tolist()
        if len(live) == len(rows):
            return scores_XV.view_as(logits_BNV)
        out_BNV = logits_BNV.clone()
        out_BNV[live_B] = scores_XV.view(len(live), num_nodes, -1)
        return out_BNV

    def check(self, row: int, path: Sequence[int], text: Text) -> None:
        """Raises ValueError if one of the nodes in `path`, which committed tokens of a row's text follow, has no token
        left."""
        dead = [at for at, node in enumerate(path) if self._dead is not None and self._dead[row][node]]
        if dead:
            names = ", ".join(dict.fromkeys(map(_name, self._of_rows[row])))
            raise ValueError(
                f"the logits processors ({names}) leave no token after the first {len(text.ids) + dead[0]} of text"
                f" {text.index}; relax them or generate fewer tokens"
            )

    def _call(self, processor: Any, prefixes_XW: Tensor, scores_XV: Tensor) -> Tensor:
        # A user's own processor is called twice once: it may keep state, such as an automaton's.
        is_own = not type(processor).__module__.startswith("transformers.")
        again_XV = scores_XV.clone() if is_own and id(processor) not in self._checked else None
        try:
            found_XV = processor(prefixes_XW, scores_XV)
            again_XV = processor(prefixes_XW, again_XV) if again_XV is not None else None
        except Exception as error:
            raise ValueError(
                f"logits processor {_name(processor)} failed on a prefix of {prefixes_XW.shape[1]} tokens: {error}"
            ) from error
        if not isinstance(found_XV, Tensor) or found_XV.shape != scores_XV.shape:
            shape = tuple(found_XV.shape) if isinstance(found_XV, Tensor) else f"a {type(found_XV).__name__}"
            raise ValueError(
                f"logits processor {_name(processor)} returned {shape}; it must return scores of shape"
                f" {tuple(scores_XV.shape)}"
            )
        found_XV = found_XV.to(scores_XV)
        if again_XV is not None and not torch.allclose(found_XV, again_XV.to(found_XV), rtol=0, atol=0, equal_nan=True):
            raise ValueError(
                f"logits processor {_name(processor)} returns other scores when it is called again on the same prefix:"
                " it keeps state or draws random numbers, so it cannot be applied to drafted tokens; leave it out"
            )
        self._checked.add(id(processor))
        return found_XV


def _name(processor: Any) -> str:
    return getattr(processor, "__name__", type(processor).__name__)


def _prefixes(draft: Draft, live_rows: Sequence[list[int]], live: Sequence[int], filler: int) -> Tensor:
    """Returns the prefix of each node of the rows in `live` [X, W], padded left with `filler`."""
    tree, device, longest = draft.tree, draft.tokens_BN.device, max(map(len, live_rows)) - 1
    committed_BL = torch.tensor([[filler] * (longest + 1 - len(row)) + row[:-1] for row in live_rows], device=device)
    live_B = torch.tensor(live, device=device)
    depths_RN, ancestors_RNN = tree.depths_RN, tree.ancestors_RNN
    levels_D = torch.arange(tree.depth + 1, device=device)
    # The ancestor, or the node itself, at each level; levels below the node's own are moved out of its prefix.
    is_at_RNND = ancestors_RNN[..., None] & (depths_RN[:, None, :, None] == levels_D)
    nodes_BND = is_at_RNND.to(torch.uint8).argmax(2).expand(len(draft.tokens_BN), -1, -1)[live_B]
    tokens_BN = draft.tokens_BN[live_B]
    path_BND = tokens_BN.gather(1, nodes_BND.flatten(1)).view_as(nodes_BND)
    prefix_BNW = torch.cat([committed_BL.long()[:, None].expand(-1, tree.num_nodes, -1), path_BND], dim=2)
    missing_BN1 = (tree.depth - depths_RN.expand(len(draft.tokens_BN), -1)[live_B])[..., None]
    from_W = torch.arange(prefix_BNW.shape[2], device=device) - missing_BN1
    return prefix_BNW.gather(2, from_W.clamp(min=0)).masked_fill(from_W < 0, filler).flatten(0, 1)
