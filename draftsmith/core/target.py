"""The target: any transformers causal LM or encoder-decoder, run over draft trees and left unchanged.

Only this file, `views.py`, `attention.py` and `architectures/` depend on the structure of transformers' models.
Layer index: hidden 0 is the embedding output, hidden i the output of the i-th block, un-normed.

Shape suffixes: B rows, T positions, N nodes of a tree, R is B or 1, S cache slots, D hidden width, V vocabulary.
"""

import copy
import hashlib
import inspect
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from draftsmith.core.architectures.adapted import adapted
from draftsmith.core.architectures.masks import AttentionMasks, key_positions
from draftsmith.core.architectures.recurrent import cache_argument, find_recurrent_modules, with_recurrent_modules
from draftsmith.core.architectures.self_check import Abilities, check_against_model, ordinary_tokens
from draftsmith.core.architectures.supported import (
    applies_windows,
    has_recurrent_layers,
    problem_of_config,
    problem_of_model,
)
from draftsmith.core.architectures.text_models import head_view, text_model
from draftsmith.core.attention import StackedMasks, with_stacked_attention
from draftsmith.core.cache import KVCache
from draftsmith.core.fixed_shapes.forwards import Shapes, fixed_shape_forward, fixed_shape_logits
from draftsmith.core.rows import groups_by_length
from draftsmith.core.tree import Draft, Tree, chain
from draftsmith.core.views import (
    LAYER_LISTS,
    ForwardContext,
    HiddenStateOutput,
    final_norm,
    find_child,
    replaced,
    unwrapped,
    view,
)
from draftsmith.loading import remote_code
from draftsmith.loading.model_info import (
    auto_class,
    context_length,
    decoder_start,
    end_tokens,
    media_token_ids,
    read_target_info,
    tokenizer_hash,
)
from draftsmith.loading.placement.packed_weights import Packing, packed_layers
from draftsmith.loading.placement.spread import input_device, loading_options, whole_parameters
from draftsmith.loading.precision import checked_device, checked_dtype
from draftsmith.loading.target_names import model_folder
from draftsmith.loading.weights import load_model

PREFILL_CHUNK = 512
PADDING_ON_CPU, PADDING = 64, 4096
"""Tokens of padding that take as long as another forward, and that a group of rows may be prefilled with."""
MAX_VIEWS = 64


@dataclass(frozen=True, kw_only=True, eq=False)
class Source:
    """The source of an encoder-decoder: token ids, their mask and the encoder's output."""

    tokens_BT: Tensor
    mask_BT: Tensor
    encoded_BTD: Tensor

    def arguments(self) -> dict[str, Tensor]:
        """Returns the decoder's arguments for cross-attention."""
        return {"encoder_hidden_states": self.encoded_BTD, "encoder_attention_mask": self.mask_BT}

    def change_rows(self, origins: list[int | None], added: "Source | None") -> "Source":
        """Returns the source whose row i is row `origins[i]` of this one, or for None the next row of `added`."""
        sources = [self] if added is None else [self, added]
        longest = max(source.tokens_BT.shape[1] for source in sources)
        sources = [source.padded(longest) for source in sources]
        new = iter(range(len(self.tokens_BT), len(self.tokens_BT) + origins.count(None)))
        rows = [next(new) if origin is None else origin for origin in origins]
        parts = [(source.tokens_BT, source.mask_BT, source.encoded_BTD) for source in sources]
        tokens_BT, mask_BT, encoded_BTD = (torch.cat(part)[rows] for part in zip(*parts, strict=True))
        return Source(tokens_BT=tokens_BT, mask_BT=mask_BT, encoded_BTD=encoded_BTD)

    def padded(self, length: int) -> "Source":
        """Returns the source padded on the right to this length."""
        if (missing := length - self.tokens_BT.shape[1]) == 0:
            return self
        tokens_BT, mask_BT = (nn.functional.pad(ids_BT, (0, missing)) for ids_BT in (self.tokens_BT, self.mask_BT))
        return Source(
            tokens_BT=tokens_BT, mask_BT=mask_BT, encoded_BTD=nn.functional.pad(self.encoded_BTD, (0, 0, 0, missing))
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Forward:
    """The hidden states of one forward of a tree, un-normed."""

    hidden_BND: Tensor
    """Output of the last block of the span; the logits [B, N, V] of a target that is run whole."""
    layers: dict[int, Tensor]
    """The requested hidden layers [B, N, D]."""


class Target:
    """A frozen model, run over trees, over spans of its blocks, or without some sublayers. Threads may share it.

    On CPUs it multiplies by packed copies of frozen linear layers' weights, unless these take more than 2 GiB;
    `pack_weights` True makes them of any size, False never.
    Raises ValueError, naming the architecture, for a model that does not support this: the constructor compares a
    small tree forward with the model's own.
    """

    def __init__(
        self, model: Any, tokenizer: Any = None, *, batch_invariant: bool = False, pack_weights: bool | None = None
    ) -> None:
        model = unwrapped(model)
        if tokenizer is not None and not hasattr(tokenizer, "get_vocab"):
            raise ValueError(f"tokenizer is a {type(tokenizer).__name__}; pass a tokenizer of transformers, or None")
        if model.training:
            raise ValueError(f"{type(model).__name__} is in training mode; call its eval() first")
        self.model = model
        self.tokenizer = tokenizer
        self.name = str(model.config._name_or_path) or type(model).__name__
        self.is_encoder_decoder = bool(model.config.is_encoder_decoder)
        self._architecture = type(model).__name__
        self._config = model.config.get_text_config(decoder=True)
        if (problem := problem_of_model(model, self._config)) is not None:
            raise ValueError(f"{self._architecture} {problem}")
        self.is_recurrent = has_recurrent_layers(self._config)
        """True if layers keep a state instead of keys and values: drafts are chains, the cache cannot be rewound."""
        self.takes_trees = not self.is_encoder_decoder and not self.is_recurrent
        self.vocab_size, self.hidden_size = int(self._config.vocab_size), int(self._config.hidden_size)
        self.context_length = context_length(self._config)  # NO_LIMIT for models with relative positions only
        # transformers' own `device` searches all modules at each call. Quantised weights may be integers.
        self._parameter = max(model.parameters(), key=Tensor.is_floating_point)
        self._input_device = input_device(model)
        self.ranks_differ = False
        """True while the ranks that share it by tensor parallelism have rows of their own, so that none can run it."""
        self._context = ForwardContext()
        self._views: dict[Any, Any] = {}
        self._stacked_masks = StackedMasks()
        self.abilities = Abilities()
        self.num_layers = int(self._config.num_hidden_layers)
        self.is_run_whole = False
        """True if only the whole model can be run: it has logits, but no hidden layers and no parts."""
        self.pads_queries = False
        """True if attention's queries can be padded alone, without the nodes that they belong to."""
        self.batch_invariant = batch_invariant
        """Whether `generate` decodes batch-invariantly unless told otherwise."""
        self.batch_invariant_shapes: dict[tuple[int, int], Shapes] = {}
        """Shapes found for batch-invariant decoding, by batch size and number of threads."""
        self._packing, self.pack_weights = Packing(), pack_weights
        self._linear_head = self._packed(nn.ModuleDict({"head": model.get_output_embeddings()})).head
        self._cache_argument = cache_argument(model)  # of state space models, which take no positions, another one
        self._takes_positions = not self.is_encoder_decoder and self._cache_argument != "cache_params"
        self._masks = AttentionMasks(model, self._config, applies_windows=True, dtype=self.dtype)
        self._recurrent: dict[str, int] = {}
        if self.is_recurrent:
            self._recurrent = find_recurrent_modules(model, self._config, ordinary_tokens(self.vocab_size))
        self._whole = with_recurrent_modules(model, model, self._recurrent, self._config)
        try:
            self._find_parts()
            check_against_model(self)
        except ValueError as error:
            if self.is_encoder_decoder:
                raise
            self.is_run_whole, self.abilities.cannot_split = True, str(error).replace(self._architecture, "it", 1)
            try:
                check_against_model(self)
            except ValueError:
                raise error from None

    @staticmethod
    def from_pretrained(
        path: str | Path,
        *,
        dtype: Any = "auto",
        device: Any = "auto",
        device_map: str | dict[str, Any] | None = None,
        tensor_parallel: bool = False,
        batch_invariant: bool = False,
        pack_weights: bool | None = None,
    ) -> "Target":
        """Loads a transformers folder, GGUF file, named target or hub name with its tokenizer.

        `device_map` spreads it over devices as transformers does, `tensor_parallel` over the processes of torchrun,
        which must then run it on the same tokens at the same time. `dtype="auto"` is the dtype of the weights, and
        bfloat16 for a GGUF file that is quantised.
        `$DRAFTSMITH_OFFLINE=1` forbids the hub, and fetching a named target.
        Raises ValueError for weights that are missing, unexpected, of another shape or not finite. Code in the folder
        is not run, unless `draftsmith.loading.remote_code.allow()` was called.
        """
        if not isinstance(path, str | Path):
            raise ValueError(f"path is a {type(path).__name__}; it must be a folder or hub name, or call Target(model)")
        dtype, placed = checked_dtype(dtype), checked_device(device)
        info = read_target_info(path := str(path))
        folder = model_folder(path)
        auto = auto_class(config := _checked_config(folder))
        options = loading_options(auto, config, device_map, tensor_parallel=tensor_parallel)
        trusted = remote_code.is_allowed()
        try:
            model = load_model(auto, folder, dtype=dtype, trust_remote_code=trusted, **options)
            model = (model if options else model.to(placed)).requires_grad_(False)
        except Exception as error:
            raise ValueError(f"target {path} cannot be loaded: {remote_code.reason(error)}") from error
        model.config._name_or_path = path  # not the cache folder's, of a GGUF file or a named target
        return Target(model, info.tokenizer, batch_invariant=batch_invariant, pack_weights=pack_weights)

    @property
    def base(self) -> "Target":
        """The target before a drafter fine-tuned it; itself if none did."""
        return self

    @property
    def device(self) -> torch.device:
        return self._input_device or self._parameter.device

    @property
    def dtype(self) -> torch.dtype:
        return self._parameter.dtype

    @cached_property
    def fingerprint(self) -> str:
        """A hash of every weight's name, shape and 64 values in bf16, the same for any dtype of loading."""
        digest = hashlib.sha256()
        for name, weight in whole_parameters(self.model):
            digest.update(f"{name}{tuple(weight.shape)}".encode())
            flat = weight.flatten()
            num_sampled = min(64, len(flat))
            # Integer arithmetic: a linspace in float32 may round differently on another device.
            index = torch.arange(num_sampled, device=flat.device) * (len(flat) - 1) // max(num_sampled - 1, 1)
            digest.update(flat[index].to("cpu", torch.bfloat16).float().numpy().tobytes())
        return digest.hexdigest()[:32]

    @cached_property
    def tokenizer_hash(self) -> str | None:
        """A hash of the tokenizer's vocabulary, None without a tokenizer."""
        return tokenizer_hash(self.tokenizer)

    @cached_property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The end-of-sequence ids of the model's generation config; empty if it has none."""
        return end_tokens(self.model.generation_config)

    @cached_property
    def media_token_ids(self) -> dict[int, str]:
        """The tokens that stand for images, sound or video, with their names in the config; none can be decoded."""
        return media_token_ids(self.model.config)

    @cached_property
    def decoder_start_token_id(self) -> int | None:
        """First token of an encoder-decoder's output; None for a causal model, or if no config names one."""
        return decoder_start(self.model.config, self.model.generation_config) if self.is_encoder_decoder else None

    def new_cache(self, batch_size: int, *, source: Source | None = None, shapes: Shapes | None = None) -> KVCache:
        """Returns an empty cache for `batch_size` rows; an encoder-decoder's includes its cross-attention.

        All forwards with the cache are run in the given `shapes`.
        """
        cache = KVCache(num_layers=self.num_layers, batch_size=batch_size, shapes=shapes)
        self._set_source(cache, source)
        return cache

    def change_rows(self, cache: KVCache, origins: list[int | None], added: KVCache | None = None) -> None:
        """Makes the cache's row i what row `origins[i]` was, or for None the next row of `added`, a prefilled cache."""
        cache.change_rows(origins, added)
        if self.is_encoder_decoder:
            # The next forward computes the cross-attention's keys and values anew, over sources of one length.
            self._set_source(cache, cache.source.change_rows(origins, added.source if added is not None else None))

    def _set_source(self, cache: KVCache, source: Source | None) -> None:
        cache.source, cache.cross_is_filled = source, {}
        # Of no config: cross-attention sees the whole source, also in decoders whose own attention has windows.
        cache.cross = DynamicCache() if self.is_encoder_decoder else None

    def encode(self, tokens_BT: Tensor, mask_BT: Tensor) -> Source:
        """Runs an encoder-decoder's encoder over right-padded sources."""
        encoded = self.model.get_encoder()(input_ids=tokens_BT, attention_mask=mask_BT).last_hidden_state
        return Source(tokens_BT=tokens_BT, mask_BT=mask_BT, encoded_BTD=encoded)

    def forward(
        self,
        tokens_BN: Tensor,
        tree: Tree,
        cache: KVCache,
        *,
        layers: tuple[int, ...] = (),
        span: tuple[int, int] | None = None,
        resume_BND: Tensor | None = None,
        skipped: frozenset[tuple[str, int]] = frozenset(),
        first: int = 0,
    ) -> Forward:
        """Runs a tree of new tokens after each row's cached ones, writing their keys and values without committing.

        `span` (start, stop) runs only those blocks; with start > 0 it resumes from `resume_BND`.
        `skipped` holds ("attention", i) and ("mlp", i) for sublayers to skip. With `first` the tokens are those of
        the tree's nodes from there on; the nodes before were fed since the last commit. Raises ValueError for a tree
        on an encoder-decoder.
        """
        if not self.takes_trees and not tree.is_chain:
            self.check_trees()
        start, stop = span or (0, self.num_layers)
        if self.is_run_whole and (layers or skipped or (start, stop) != (0, self.num_layers)):
            self.check_splits()
        if start == self.num_layers:
            assert resume_BND is not None, "there is nothing to run after the last block"
            return Forward(hidden_BND=resume_BND, layers=dict.fromkeys(layers, resume_BND))
        assert tokens_BN.shape[1] == tree.num_nodes - first
        run = partial(self._run, cache=cache, layers=layers, start=start, stop=stop, skipped=skipped)
        if cache.shapes is not None:
            return fixed_shape_forward(run, cache.shapes, tokens_BN, tree, first=first, resume_BND=resume_BND)
        return run(tokens_BN, tree, first, resume_BND)

    def _run(
        self,
        tokens_BN: Tensor,
        tree: Tree,
        first: int,
        resume_BND: Tensor | None,
        *,
        cache: KVCache,
        layers: tuple[int, ...],
        start: int,
        stop: int,
        skipped: frozenset[tuple[str, int]],
    ) -> Forward:
        """Runs the tree's nodes from `first` on in one forward of the model."""
        cache.prepare(tree.num_nodes, tokens_BN.device, first=first)
        lengths_B1 = torch.tensor(cache.lengths, device=tokens_BN.device)[:, None]
        # A row close to the limit may draft past the context; those tokens are never kept.
        positions_BN = (lengths_B1 + tree.depths_RN[:, first:]).clamp(max=self.context_length - 1)
        masks = self._masks.make(tree, cache, positions_BN, first=first)
        arguments: dict[str, Any] = {"attention_mask": masks, self._cache_argument: cache, "use_cache": True}
        if self._takes_positions:
            arguments["position_ids"] = positions_BN
        if self.is_run_whole:
            return Forward(hidden_BND=self._whole(input_ids=tokens_BN, **arguments).logits, layers={})
        keys = partial(key_positions, tree, cache)
        self._context.begin(positions_BN=positions_BN, key_positions=keys, wanted=layers, resume=resume_BND)
        if cache.shapes is not None:
            self._stacked_masks.begin(row_multiple=cache.shapes.query_multiple)
        else:
            ends = [length + tree.num_nodes for length in cache.lengths]
            self._stacked_masks.begin(ends=ends if cache.is_ragged and tokens_BN.device.type == "cpu" else [])
        if self.is_encoder_decoder:
            arguments["past_key_values"] = both = EncoderDecoderCache(cache, cache.cross)
            both.is_updated = cache.cross_is_filled
            arguments |= cache.source.arguments()
        with self._packing.switched(on=cache.shapes is None or cache.shapes.packs_weights):
            out_BND = self._view(start, stop, skipped)(input_ids=tokens_BN, **arguments).last_hidden_state
        hidden = self._context.end()
        self._stacked_masks.begin()
        if self.num_layers in layers and stop == self.num_layers:
            hidden[self.num_layers] = out_BND
        return Forward(hidden_BND=self._here(out_BND), layers={key: self._here(one) for key, one in hidden.items()})

    def forward_draft(self, draft: Draft, cache: KVCache, *, layers: tuple[int, ...] = ()) -> Forward:
        """Runs a draft's nodes, from its resume point if the drafter ran the target's first blocks."""
        if (point := draft.resume_point) is None:
            return self.forward(draft.tokens_BN, draft.tree, cache, layers=layers)
        span = (point.layer, self.num_layers)
        return self.forward(draft.tokens_BN, draft.tree, cache, layers=layers, span=span, resume_BND=point.hidden_BND)

    def prefill(self, rows: list[list[int]], cache: KVCache, *, layers: tuple[int, ...] = ()) -> dict[int, Tensor]:
        """Feeds and commits `rows` to an empty cache; returns the requested hidden layers [B, T, D], right-padded."""
        # Rows of very different lengths are fed in groups, each padded to its own longest row.
        most = PADDING_ON_CPU if self.device.type == "cpu" else PADDING
        groups = groups_by_length([len(ids) for ids in rows], most)
        if len(groups) == 1 or cache.shapes is not None or self.is_recurrent or self.is_encoder_decoder:
            return self._prefill(rows, cache, layers)
        hidden: dict[int, Tensor] = {}
        for group in groups:
            part = self.new_cache(len(group))
            for layer, hidden_GTD in self._prefill([rows[row] for row in group], part, layers).items():
                if layer not in hidden:  # the first group has the longest row
                    hidden[layer] = hidden_GTD.new_zeros(len(rows), *hidden_GTD.shape[1:])
                hidden[layer][group, : hidden_GTD.shape[1]] = hidden_GTD
            cache.change_rows([None if row in group else row for row in range(len(rows))], part)
        return hidden

    def _prefill(self, rows: list[list[int]], cache: KVCache, layers: tuple[int, ...]) -> dict[int, Tensor]:
        longest = max(map(len, rows))
        parts: dict[int, list[Tensor]] = {layer: [] for layer in layers}
        padded = [ids + [0] * (longest - len(ids)) for ids in rows]
        tokens_BT = torch.tensor(padded, dtype=torch.long, device=self.device)
        most = cache.shapes.most_of_a_row(len(rows)) if cache.shapes is not None else PREFILL_CHUNK
        for begin in range(0, longest, most):
            chunk = min(most, longest - begin)
            out = self.forward(tokens_BT[:, begin : begin + chunk], chain(chunk, self.device), cache, layers=layers)
            for layer in layers:
                parts[layer].append(out.layers[layer])
            # Shorter rows are fed padding, which the line after the loop removes; from a state it cannot be removed.
            counts = [min(chunk, max(len(ids) - begin, 0)) if self.is_recurrent else chunk for ids in rows]
            cache.commit([list(range(count)) for count in counts])
        cache.lengths = [len(ids) for ids in rows]
        return {layer: torch.cat(chunks, dim=1) for layer, chunks in parts.items() if chunks}

    def read(self, tokens_BT: Tensor, layers: tuple[int, ...], source: Source | None = None) -> dict[int, Tensor]:
        """Returns the requested hidden layers [B, T, D] of right-padded rows, in one causal pass without a cache."""
        self._check_has_parts()
        if self.abilities.cannot_train:
            raise ValueError(
                f"{self._architecture} reads whole texts otherwise than it decodes ({self.abilities.cannot_train})"
            )
        positions_1T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)[None]
        self._context.begin(positions_BN=positions_1T, key_positions=lambda: positions_1T, wanted=layers)
        arguments = source.arguments() if source is not None else {}
        run = self._view(0, self.num_layers, frozenset())
        out_BTD = run(input_ids=tokens_BT, use_cache=False, **arguments).last_hidden_state
        hidden = self._context.end()
        return {layer: self._here(out_BTD if layer == self.num_layers else hidden[layer]) for layer in layers}

    def _here(self, tensor: Tensor) -> Tensor:
        """Returns an output of a model spread by `device_map` on the device that takes tokens."""
        return tensor if self._input_device is None else tensor.to(self._input_device)

    def check_trees(self, need: str = "not trees") -> None:
        """Raises ValueError, which ends with what is needed, if drafts must be chains."""
        if not self.takes_trees:
            kind = "has recurrent layers" if self.is_recurrent else "is an encoder-decoder"
            raise ValueError(f"{self._architecture} {kind}: it verifies chains, {need}")

    def check_splits(self, skipped: frozenset[tuple[str, int]] = frozenset()) -> None:
        """Raises ValueError if the blocks cannot be run in parts, or without these sublayers."""
        if self.is_encoder_decoder:
            raise ValueError(f"{self._architecture} is an encoder-decoder, whose blocks cannot be run in parts")
        self._check_has_parts()
        if problem := self.abilities.cannot_split:
            raise ValueError(f"the blocks of {self._architecture} cannot be run in parts ({problem})")
        if skipped:
            self._view(0, self.num_layers, skipped)

    def _check_has_parts(self) -> None:
        """Raises ValueError for a model that is run whole."""
        if self.is_run_whole:
            raise ValueError(
                f"{self._architecture} is run whole, without hidden states or parts, since"
                f" {self.abilities.cannot_split}: take a drafter that needs its tokens only, such as look-up, n-grams,"
                " a store of text or a draft LM"
            )

    def check_batch(self, num_rows: int) -> None:
        """Raises ValueError if rows of unequal lengths cannot be run in one batch."""
        if num_rows > 1 and (problem := self.abilities.cannot_batch):
            raise ValueError(
                f"{self._architecture} cannot run {num_rows} rows of unequal lengths ({problem}); decode them one at a"
                " time"
            )

    def norm(self, hidden_BTD: Tensor) -> Tensor:
        """Applies the model's final norm."""
        self._check_has_parts()
        return self._norm(hidden_BTD)

    def copy_norm(self) -> nn.Module:
        """Returns a trainable copy of the model's final norm."""
        self._check_has_parts()
        return copy.deepcopy(self._norm).requires_grad_(True)

    def head(self, normed_BTD: Tensor) -> Tensor:
        """Returns logits [..., V] by the model's head, scaling and soft-capping included."""
        self._check_has_parts()
        if self.abilities.head_is_linear:
            return self._here(self._linear_head(normed_BTD))
        if normed_BTD.ndim == 2:
            return self.head(normed_BTD[None])[0]
        if self.is_encoder_decoder:
            dummy = HiddenStateOutput(last_hidden_state=normed_BTD[:, :1])
            return self._head(encoder_outputs=dummy, decoder_inputs_embeds=normed_BTD, use_cache=False).logits
        return self._here(self._head(inputs_embeds=normed_BTD, use_cache=False).logits)

    @property
    def head_is_linear(self) -> bool:
        """True if logits are the product of the normed state and the head's weights, without scaling or capping."""
        return self.abilities.head_is_linear

    def logits(self, hidden_BTD: Tensor, shapes: Shapes | None = None) -> Tensor:
        """Returns logits [B, T, V] from the last block's un-normed output, computed in `shapes` if there are any."""
        if self.is_run_whole:
            return hidden_BTD
        if shapes is not None:
            with self._packing.switched(on=shapes.packs_weights):
                return fixed_shape_logits(self.logits, shapes, hidden_BTD)
        return self.head(self.norm(hidden_BTD))

    def _find_parts(self) -> None:
        stack = self.find_stack()
        blocks_name = find_child(stack, LAYER_LISTS, "list of blocks")
        if getattr(stack, "project_out", None) is not None:
            raise ValueError(f"{self._architecture} projects after its final norm")
        self.num_layers = len(getattr(stack, blocks_name))
        norm_name = final_norm(stack)
        self._norm = getattr(stack, norm_name) if norm_name else nn.Identity()
        own_windows = applies_windows(stack)
        self._masks = AttentionMasks(self.model, self._config, applies_windows=own_windows, dtype=self.dtype)
        self._head = head_view(self.model, stack)
        stack = with_recurrent_modules(stack, self.model, self._recurrent, self._config)
        stacked = with_stacked_attention(stack, self._stacked_masks, blocks_name)
        self.pads_queries = stacked is not stack
        self._stack = self._packed(adapted(stacked, self._context))
        if self.is_encoder_decoder:  # decoders with rotary positions take them, others embed the context's
            self._takes_positions = "position_ids" in inspect.signature(stack.forward).parameters

    def _packed(self, module: Any) -> Any:
        return replaced(module, packed_layers(module, self._packing, request=self.pack_weights))

    def decoding_modules(self) -> nn.ModuleList:
        """Returns what decoding runs: the blocks, whose linear layers may be packed, and the head."""
        return nn.ModuleList([self._stack, self._linear_head if self.head_is_linear else self._head])

    def find_stack(self) -> Any:
        """Returns the model's own stack of decoder blocks; raises ValueError naming the architecture without one."""
        model = text_model(self.model)
        decoder: Any = getattr(model, "get_decoder", lambda: None)()
        if decoder is model and isinstance(getattr(model, "model", None), nn.Module):
            decoder = model.model  # Llama 4's is not called as its base_model_prefix says
        if decoder is None or decoder is model:
            raise ValueError(f"{self._architecture} has no decoder stack that draftsmith supports")
        return decoder.decoder if self.is_encoder_decoder and hasattr(decoder, "decoder") else decoder

    def _view(self, start: int, stop: int, skipped: frozenset[tuple[str, int]]) -> Any:
        if self.ranks_differ:
            raise ValueError(
                f"{self.name} is spread by tensor parallelism, so blocks cannot be run on rows of one rank; train this"
                " drafter without --tensor-parallel"
            )
        key = (start, stop, skipped)
        if (run := self._views.get(key)) is None:
            if key != (0, self.num_layers, frozenset()):
                self.check_splits()
            outputs = self.abilities.outputs
            run = view(self._stack, self._context, start, stop, skipped, width=self.hidden_size, outputs=outputs)
            # A layer search tries thousands of sets of skipped sublayers. Replacing the dictionary is safe in threads.
            self._views = dict(list(self._views.items())[-MAX_VIEWS + 1 :]) | {key: run}
        return run


def _checked_config(folder: str) -> Any:
    """Returns the configuration; raises ValueError, naming the architecture, if it tells that it is unsupported."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=remote_code.is_allowed())
    if (problem := problem_of_config(config.get_text_config(decoder=True))) is not None:
        raise ValueError(f"{(config.architectures or [config.model_type])[0]} {problem}")
    return config
