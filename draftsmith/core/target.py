"""The target: any transformers causal LM or encoder-decoder, run over draft trees and left unchanged.

Only this file and `views.py` depend on the structure of transformers' models.
Layer index: hidden 0 is the embedding output, hidden i the output of the i-th block, un-normed.

Shape suffixes: B rows, T positions, N nodes of a tree, R is B or 1, S cache slots, D hidden width, V vocabulary.
"""

import copy
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from draftsmith.core.attention import StackedMasks, with_stacked_attention
from draftsmith.core.cache import KVCache, visible
from draftsmith.core.fixed_shapes.forwards import Shapes, fixed_shape_forward, fixed_shape_logits
from draftsmith.core.tree import Draft, Tree, chain
from draftsmith.core.views import (
    LAYER_LISTS,
    ForwardContext,
    Outputs,
    applies_windows,
    final_norm,
    find_child,
    head_view,
    recorded_outputs,
    relative_bias,
    unwrapped,
    view,
)
from draftsmith.loading import remote_code
from draftsmith.loading.model_info import context_length, decoder_start, end_tokens, read_target_info, tokenizer_hash
from draftsmith.loading.target_names import model_folder
from draftsmith.loading.weights import load_model

LAYER_KINDS = {"full_attention", "sliding_attention"}
ATTENTION_KINDS = {"sdpa", "eager"}
PREFILL_CHUNK = 512
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
        new = iter(range(len(self.tokens_BT), len(self.tokens_BT) + origins.count(None)))
        rows = [next(new) if origin is None else origin for origin in origins]
        padded = []
        for source in sources:
            pad = (0, longest - source.tokens_BT.shape[1])
            encoded_BTD = nn.functional.pad(source.encoded_BTD, (0, 0, *pad))
            padded.append([nn.functional.pad(ids, pad) for ids in (source.tokens_BT, source.mask_BT)] + [encoded_BTD])
        tokens_BT, mask_BT, encoded_BTD = (torch.cat(parts)[rows] for parts in zip(*padded, strict=True))
        return Source(tokens_BT=tokens_BT, mask_BT=mask_BT, encoded_BTD=encoded_BTD)


@dataclass(frozen=True, kw_only=True, eq=False)
class Forward:
    """The hidden states of one forward of a tree, un-normed."""

    hidden_BND: Tensor
    """Output of the last block of the span; the logits [B, N, V] of a target that is run whole."""
    layers: dict[int, Tensor]
    """The requested hidden layers [B, N, D]."""


class _NoHiddenStates(ValueError):
    """Raised where a model's hidden states have a shape of their own."""


class Target:
    """A frozen model, run over trees, over spans of its blocks, or without some sublayers. Threads may share it.

    Raises ValueError, naming the architecture, for a model that does not support this: the constructor compares a
    small tree forward with the model's own.
    """

    def __init__(self, model: Any, tokenizer: Any = None, *, batch_invariant: bool = False) -> None:
        model = unwrapped(model)
        if tokenizer is not None and not hasattr(tokenizer, "get_vocab"):
            raise ValueError(f"tokenizer is a {type(tokenizer).__name__}; pass a tokenizer of transformers, or None")
        if model.training:
            raise ValueError(f"{type(model).__name__} is in training mode; call its eval() first")
        self.model = model
        self.tokenizer = tokenizer
        self.name = str(model.config._name_or_path) or type(model).__name__
        self.is_encoder_decoder = bool(model.config.is_encoder_decoder)
        self.takes_trees = not self.is_encoder_decoder  # an encoder-decoder verifies chains only
        self._architecture = type(model).__name__
        self._config = model.config.get_text_config(decoder=True)
        self.vocab_size, self.hidden_size = int(self._config.vocab_size), int(self._config.hidden_size)
        self.context_length = context_length(self._config)  # NO_LIMIT for models with relative positions only
        # transformers' own `device` searches all modules at each call. Quantised weights may be integers.
        self._parameter = max(model.parameters(), key=Tensor.is_floating_point)
        self._context = ForwardContext()
        self._views: dict[Any, Any] = {}
        self._stacked_masks = StackedMasks()
        self._outputs = Outputs()
        self._applies_windows = True
        # Why its blocks cannot be run in parts, batches of unequal rows, and whole texts; empty if they can.
        self._cannot_split = self._cannot_batch = self._cannot_train = ""
        self.num_layers = int(self._config.num_hidden_layers)
        self.is_run_whole = False
        """True if only the whole model can be run: it has logits, but no hidden layers and no parts."""
        self.pads_queries = False
        """True if attention's queries can be padded alone, without the nodes that they belong to."""
        self.batch_invariant = batch_invariant
        """Whether `generate` decodes batch-invariantly unless told otherwise."""
        self.batch_invariant_shapes: dict[tuple[int, int], Shapes] = {}
        """Shapes found for batch-invariant decoding, by batch size and number of threads."""
        self._check_supported()
        try:
            self._find_parts()
            self._check_against_model()
        except ValueError as error:
            if self.is_encoder_decoder:
                raise
            self.is_run_whole, self._cannot_split = True, str(error).removeprefix(f"{self._architecture} ")
            try:
                self._check_against_model()
            except ValueError:
                raise error from None

    @staticmethod
    def from_pretrained(
        path: str | Path, *, dtype: str = "auto", device: str = "auto", batch_invariant: bool = False
    ) -> "Target":
        """Loads a transformers folder, GGUF file, named target or hub name with its tokenizer.

        `dtype="auto"` is the dtype of the weights, and bfloat16 for a GGUF file that is quantised.
        `$DRAFTSMITH_OFFLINE=1` forbids the hub, and fetching a named target.
        Raises ValueError for weights that are missing, unexpected, of another shape or not finite. Code in the folder
        is not run, unless `draftsmith.loading.remote_code.allow()` was called.
        """
        if not isinstance(path, str | Path):
            raise ValueError(f"path is a {type(path).__name__}; it must be a folder or hub name, or call Target(model)")
        info = read_target_info(path := str(path))
        auto = AutoModelForSeq2SeqLM if info.is_encoder_decoder else AutoModelForCausalLM
        device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        trusted = remote_code.is_allowed()
        try:
            model = load_model(auto, model_folder(path), dtype=dtype, trust_remote_code=trusted).to(device)
        except Exception as error:
            raise ValueError(f"target {path} cannot be loaded: {remote_code.reason(error)}") from error
        model.config._name_or_path = path  # not the cache folder's, of a GGUF file or a named target
        return Target(model, info.tokenizer, batch_invariant=batch_invariant)

    @property
    def base(self) -> "Target":
        """The target before a drafter fine-tuned it; itself if none did."""
        return self

    @property
    def device(self) -> torch.device:
        return self._parameter.device

    @property
    def dtype(self) -> torch.dtype:
        return self._parameter.dtype

    @cached_property
    def fingerprint(self) -> str:
        """A hash of every weight's name, shape and 64 values in bf16, the same for any dtype of loading."""
        digest = hashlib.sha256()
        for name, weight in sorted(self.model.named_parameters()):
            digest.update(f"{name}{tuple(weight.shape)}".encode())
            flat = weight.detach().flatten()
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
        cache.cross = DynamicCache(config=self.model.config) if self.is_encoder_decoder else None

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
        if self.is_encoder_decoder and not tree.is_chain:
            raise ValueError(f"{self._architecture} is an encoder-decoder: it verifies chains, not trees")
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
        masks = self._masks(tree, cache, positions_BN, first)
        arguments: dict[str, Any] = {"attention_mask": masks, "past_key_values": cache, "use_cache": True}
        if self.is_run_whole:
            logits_BNV = self.model(input_ids=tokens_BN, position_ids=positions_BN, **arguments).logits
            return Forward(hidden_BND=logits_BNV, layers={})
        self._context.begin(positions_BN=positions_BN, wanted=layers, resume=resume_BND)
        self._stacked_masks.begin(row_multiple=cache.shapes.query_multiple if cache.shapes is not None else 1)
        if self.is_encoder_decoder:
            arguments["past_key_values"] = both = EncoderDecoderCache(cache, cache.cross)
            both.is_updated = cache.cross_is_filled
            arguments |= cache.source.arguments()
        else:
            arguments["position_ids"] = positions_BN
        out_BND = self._view(start, stop, skipped)(input_ids=tokens_BN, **arguments).last_hidden_state
        hidden = self._context.end()
        self._stacked_masks.begin()
        if self.num_layers in layers and stop == self.num_layers:
            hidden[self.num_layers] = out_BND
        return Forward(hidden_BND=out_BND, layers=hidden)

    def forward_draft(self, draft: Draft, cache: KVCache, *, layers: tuple[int, ...] = ()) -> Forward:
        """Runs a draft's nodes, from its resume point if the drafter ran the target's first blocks."""
        if (point := draft.resume_point) is None:
            return self.forward(draft.tokens_BN, draft.tree, cache, layers=layers)
        span = (point.layer, self.num_layers)
        return self.forward(draft.tokens_BN, draft.tree, cache, layers=layers, span=span, resume_BND=point.hidden_BND)

    def prefill(self, rows: list[list[int]], cache: KVCache, *, layers: tuple[int, ...] = ()) -> dict[int, Tensor]:
        """Feeds and commits `rows` to an empty cache; returns the requested hidden layers [B, T, D], right-padded."""
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
            # Shorter rows are fed padding, which the line after the loop removes.
            cache.commit([list(range(chunk)) for _ in rows])
        cache.lengths = [len(ids) for ids in rows]
        return {layer: torch.cat(chunks, dim=1) for layer, chunks in parts.items() if chunks}

    def read(self, tokens_BT: Tensor, layers: tuple[int, ...], source: Source | None = None) -> dict[int, Tensor]:
        """Returns the requested hidden layers [B, T, D] of right-padded rows, in one causal pass without a cache."""
        self._check_has_parts()
        if self._cannot_train:
            raise ValueError(f"{self._architecture} reads whole texts otherwise than it decodes ({self._cannot_train})")
        positions_1T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)[None]
        self._context.begin(positions_BN=positions_1T, wanted=layers)
        arguments = source.arguments() if source is not None else {}
        run = self._view(0, self.num_layers, frozenset())
        out_BTD = run(input_ids=tokens_BT, use_cache=False, **arguments).last_hidden_state
        hidden = self._context.end()
        return {layer: out_BTD if layer == self.num_layers else hidden[layer] for layer in layers}

    def check_splits(self, skipped: frozenset[tuple[str, int]] = frozenset()) -> None:
        """Raises ValueError if the blocks cannot be run in parts, or without these sublayers."""
        if self.is_encoder_decoder:
            raise ValueError(f"{self._architecture} is an encoder-decoder, whose blocks cannot be run in parts")
        self._check_has_parts()
        if self._cannot_split:
            raise ValueError(f"the blocks of {self._architecture} cannot be run in parts ({self._cannot_split})")
        if skipped:
            self._view(0, self.num_layers, skipped)

    def _check_has_parts(self) -> None:
        """Raises ValueError for a model that is run whole."""
        if self.is_run_whole:
            raise ValueError(
                f"{self._architecture} {self._cannot_split}; it is run whole, without hidden states or parts, so take a"
                " drafter that needs its tokens only: look-up, n-grams, a store of text or a draft LM"
            )

    def check_batch(self, num_rows: int) -> None:
        """Raises ValueError if rows of unequal lengths cannot be run in one batch."""
        if num_rows > 1 and self._cannot_batch:
            raise ValueError(
                f"{self._architecture} cannot run {num_rows} rows of unequal lengths ({self._cannot_batch}); decode"
                " them one at a time"
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
        if self._head_is_linear:
            return self._linear_head(normed_BTD)
        if normed_BTD.ndim == 2:
            return self.head(normed_BTD[None])[0]
        if self.is_encoder_decoder:
            dummy = (normed_BTD[:, :1],)
            return self._head(encoder_outputs=dummy, decoder_inputs_embeds=normed_BTD, use_cache=False).logits
        return self._head(inputs_embeds=normed_BTD, use_cache=False).logits

    @property
    def head_is_linear(self) -> bool:
        """True if logits are the product of the normed state and the head's weights, without scaling or capping."""
        return self._head_is_linear

    def logits(self, hidden_BTD: Tensor, shapes: Shapes | None = None) -> Tensor:
        """Returns logits [B, T, V] from the last block's un-normed output, computed in `shapes` if there are any."""
        if self.is_run_whole:
            return hidden_BTD
        if shapes is not None:
            return fixed_shape_logits(self.logits, shapes, hidden_BTD)
        return self.head(self.norm(hidden_BTD))

    def _find_parts(self) -> None:
        stack = self._find_stack()
        blocks_name = find_child(stack, LAYER_LISTS, "list of blocks")
        if getattr(stack, "project_out", None) is not None:
            raise ValueError(f"{self._architecture} projects after its final norm")
        self.num_layers = len(getattr(stack, blocks_name))
        norm_name = final_norm(stack)
        self._norm = getattr(stack, norm_name) if norm_name else nn.Identity()
        self._applies_windows = applies_windows(stack)
        self._head = head_view(self.model)
        self._stack = with_stacked_attention(stack, self._stacked_masks, blocks_name)
        self.pads_queries = self._stack is not stack

    def _find_stack(self) -> Any:
        decoder = getattr(self.model, "get_decoder", lambda: None)()
        if decoder is None or decoder is self.model:
            raise ValueError(f"{self._architecture} has no decoder stack that draftsmith supports")
        return decoder.decoder if self.is_encoder_decoder and hasattr(decoder, "decoder") else decoder

    def _check_supported(self) -> None:
        kinds, problem = set(getattr(self._config, "layer_types", None) or ()) - LAYER_KINDS, None
        if kinds:
            problem = f"has layers of kind {', '.join(sorted(kinds))}, whose state cannot be rewound"
        elif "local" in (getattr(self._config, "attention_layers", None) or ()):
            problem = "windows its local attention by cache slots, which trees do not fit"
        elif (attention := self._config._attn_implementation) not in ATTENTION_KINDS:
            problem = f"uses attention {attention!r}, which takes no tree mask; load it with attn_implementation='sdpa'"
        elif any(hasattr(module, "_hf_hook") for module in self.model.modules()):
            problem = "is spread over devices by device_map; load it on one device"
        if problem is not None:
            raise ValueError(f"{self._architecture} {problem}")

    @torch.inference_mode()
    def _check_against_model(self) -> None:
        """Compares a prefill and a tree with the model's own forward on eight tokens, in its own dtype."""
        # Ordinary tokens: padding and special ones, for which weights are often untrained, have low ids.
        lowest = min(8, self.vocab_size // 2)
        ids = lowest + torch.arange(8, device=self.device)[None] * 7919 % (self.vocab_size - lowest)
        self._linear_head, self._head_is_linear = self.model.get_output_embeddings(), False
        try:
            if self.is_encoder_decoder:
                source = self.encode(ids, torch.ones_like(ids))
                given = {"encoder_outputs": (source.encoded_BTD,), "attention_mask": source.mask_BT}
                with recorded_outputs(self._find_stack()) as self._outputs:
                    expected = self.model(decoder_input_ids=ids, **given).logits[0]
                tree, fed, path = chain(4, self.device), ids[:, 4:], [0, 1, 2, 3]
            else:
                source, expected = None, self._expected_logits(ids)
                tree = Tree.from_parents([[-1, 0, 0, 2, 3]], self.device)
                fed, path = ids[:, [4, 0, 5, 6, 7]], [0, 2, 3, 4]
            cache = self.new_cache(1, source=source)
            self.prefill([ids[0, :4].tolist()], cache)
            out = self.forward(fed, tree, cache, layers=() if self.is_run_whole else (0, 1))
            if any(hidden.ndim != 3 for hidden in out.layers.values()):
                raise _NoHiddenStates("its hidden states are not [batch, length, width]")
            found = self.logits(out.hidden_BND)[0, path]
            if (linear := self._linear_head) is not None and not self.is_run_whole:
                normed = self.norm(out.hidden_BND)
                self._head_is_linear = torch.equal(linear(normed), self.head(normed))
        except (AttributeError, TypeError, KeyError, IndexError, RuntimeError, ValueError) as error:
            kinds = sorted({str(weight.dtype).removeprefix("torch.") for weight in self.model.parameters()})
            cause = f"; its weights are of {' and '.join(kinds)}, so cast them to one" if len(kinds) > 1 else ""
            reason = error if isinstance(error, _NoHiddenStates) else f"it does not take their cache and mask{cause}"
            raise ValueError(f"{self._architecture} cannot be run over draft trees: {reason}") from error
        if (gap := self._gap(found, expected[4:])) is not None:
            raise ValueError(
                f"{self._architecture} returns other logits for a draft tree than in its own forward (off by"
                f" {gap:.2g}), so draftsmith cannot verify drafts for it{self._quantised_activations()}"
            )
        expected_ragged = expected[[4, 5, 2, 3]]
        self._cannot_batch = self._problem_of(lambda: self._logits_of_ragged_rows(ids[0], source), expected_ragged)
        if self.is_run_whole:
            return
        self._cannot_train = self._problem_of(lambda: self._logits_of_whole_text(ids, source), expected)
        if not self.is_encoder_decoder:
            self._cannot_split = self._problem_of(lambda: self._hidden_in_two_spans(ids), out.hidden_BND[0, path])

    def _expected_logits(self, ids_1T: Tensor) -> Tensor:
        """Returns a causal model's own logits [T, V], and records what its blocks return."""
        if self.is_run_whole:
            return self.model(input_ids=ids_1T).logits[0]
        with recorded_outputs(self._find_stack()) as self._outputs:
            return self.model(input_ids=ids_1T).logits[0]

    def _gap(self, found: Tensor, expected: Tensor) -> float | None:
        """Returns how far two results are apart, relative to the largest value; None if no further than rounding."""
        tolerance = 1e-3 if expected.dtype in (torch.float32, torch.float64) else 0.1
        gap = (found - expected).abs().max().item() / max(1.0, expected.abs().max().item())
        return None if gap < tolerance else gap

    def _problem_of(self, compute: Callable[[], Tensor], expected: Tensor) -> str:
        """Returns why a computation fails, or how far off its result is; empty if it is right."""
        try:
            gap = self._gap(compute(), expected)
        except (AttributeError, TypeError, KeyError, IndexError, RuntimeError, ValueError) as error:
            return str(error).split("\n")[0]
        return "" if gap is None else f"off by {gap:.2g}"

    def _logits_of_ragged_rows(self, ids_T: Tensor, source: Source | None) -> Tensor:
        """Returns the logits of tokens 4 and 5 behind four, and of tokens 2 and 3 behind two, computed in one batch."""
        if source is not None:
            source = self.encode(source.tokens_BT.repeat(2, 1), source.mask_BT.repeat(2, 1))
        cache = self.new_cache(2, source=source)
        self.prefill([ids_T[:4].tolist(), ids_T[:2].tolist()], cache)
        out = self.forward(torch.stack([ids_T[4:6], ids_T[2:4]]), chain(2, self.device), cache)
        return self.logits(out.hidden_BND).flatten(0, 1)

    def _logits_of_whole_text(self, ids_1T: Tensor, source: Source | None) -> Tensor:
        return self.logits(self.read(ids_1T, (self.num_layers,), source)[self.num_layers])[0]

    def _hidden_in_two_spans(self, ids_1T: Tensor) -> Tensor:
        """Returns the last block's output at tokens 4 to 7 behind four, the blocks run in two parts."""
        cache, half = self.new_cache(1), max(self.num_layers // 2, 1)
        self.prefill([ids_1T[0, :4].tolist()], cache)
        below = self.forward(ids_1T[:, 4:], chain(4, self.device), cache, span=(0, half))
        span = (half, self.num_layers)
        out = self.forward(ids_1T[:, 4:], chain(4, self.device), cache, span=span, resume_BND=below.hidden_BND)
        return out.hidden_BND[0]

    def _quantised_activations(self) -> str:
        kinds = {type(part).__name__ for part in self.model.modules() if "quantized.dynamic" in type(part).__module__}
        return (
            f": its {', '.join(kinds)} layers round activations depending on the other tokens of a forward"
            if kinds
            else ""
        )

    def _view(self, start: int, stop: int, skipped: frozenset[tuple[str, int]]) -> Any:
        key = (start, stop, skipped)
        if (run := self._views.get(key)) is None:
            if key != (0, self.num_layers, frozenset()):
                self.check_splits()
            base = relative_bias(self._stack, self._context) if hasattr(self._stack, "block") else self._stack
            run = view(base, self._context, start, stop, skipped, width=self.hidden_size, outputs=self._outputs)
            # A layer search tries thousands of sets of skipped sublayers. Replacing the dictionary is safe in threads.
            self._views = dict(list(self._views.items())[-MAX_VIEWS + 1 :]) | {key: run}
        return run

    def _masks(self, tree: Tree, cache: KVCache, positions_BN: Tensor, first: int) -> Any:
        """Returns the mask [R, 1, N, S], or a mask for each kind of layer if the model has two."""
        kinds = set(getattr(self._config, "layer_types", None) or ())
        window = getattr(self._config, "sliding_window", None) if self._applies_windows else None
        if not kinds:
            kinds = {"sliding_attention"} if window else {"full_attention"}
        full_RNS = visible(tree, cache, first=first)
        masks = {}
        for kind in kinds:
            mask_RNS = full_RNS
            if kind == "sliding_attention" and window and cache.num_visible > window:
                slots_S = torch.arange(cache.num_visible, device=positions_BN.device)
                lengths_B1 = torch.tensor(cache.lengths, device=positions_BN.device)[:, None]
                node_BS = (slots_S - lengths_B1).clamp(0, tree.num_nodes - 1)
                depths_BN = tree.depths_RN.expand(len(cache.lengths), -1)
                keys_BS = torch.where(slots_S < lengths_B1, slots_S, lengths_B1 + depths_BN.gather(1, node_BS))
                mask_RNS = full_RNS & (positions_BN[:, :, None] - keys_BS[:, None] < window)
            # Attention that transformers has not brought into its common form checks the number of rows.
            num_rows = len(mask_RNS) if self.model._supports_sdpa else len(cache.lengths)
            masks[kind] = self._as_mask(mask_RNS.expand(num_rows, -1, -1))
        return masks if len(masks) > 1 else next(iter(masks.values()))

    def _as_mask(self, visible_RNS: Tensor) -> Tensor:
        if self._config._attn_implementation == "sdpa":
            return visible_RNS[:, None]
        # Eager attention adds its mask: a boolean one would have no effect.
        lowest = torch.finfo(self.dtype).min
        return torch.zeros_like(visible_RNS, dtype=self.dtype).masked_fill(~visible_RNS, lowest)[:, None]
