"""Multi-token prediction heads (DeepSeek-V3, 2412.19437, section 2.2), applied recursively (FastMTP, 2509.18362).

Position t of the head reads the embedding of token t + 1 and the hidden state of position t, both normed and projected
to one vector. One decoder layer of the target's own class runs over these, and its normed output goes to the target's
LM head, for token t + 2, and is the hidden state of the next position of a draft. The hidden states of committed
positions are the target's, after its final norm or, as in MiMo-7B, before it.

With several heads, head i drafts token i of a draft, from 0 (`heads_state`); tokens after those come from the last
head, applied to its own output.

Shape suffixes: B rows, N nodes, M new nodes, D hidden width, V vocabulary, W tokens of the shortlist.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from draftsmith.core import drafter
from draftsmith.core.cache import KVCache
from draftsmith.core.drafter import Session, Step
from draftsmith.core.target import Target
from draftsmith.core.tree import Draft, Tree
from draftsmith.core.views import LAYER_LISTS, final_norm, find_child
from draftsmith.drafters.mtp.heads_state import HeadsState
from draftsmith.length import policies
from draftsmith.loading.precision import KeepsPrecision, cast
from draftsmith.parts import autoregressive
from draftsmith.parts.checks import MAX_NODES, check_at_least, check_model
from draftsmith.parts.neural.shortlist import SharedHead

MAX_HEADS = 64
"""Most heads of a drafter, each of which is a decoder layer of the target's size; published checkpoints have three."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """The decoder layer, and the length of drafts."""

    model: dict[str, Any]
    """The transformers configuration, including `model_type`, of a model whose only layer is the head's."""
    shortlist: int = 0
    """If not 0, compute logits for this many tokens only (draftsmith/parts/neural/shortlist.py)."""
    num_heads: int = 1
    """Number of heads; the last drafts all tokens after its own."""
    is_chained: bool = True
    """Whether a head reads the output of the head before it, as in DeepSeek-V3; if not, the target's hidden state."""
    reads_normed: bool = True
    """Whether the target's hidden states are read after its final norm; if not, before it."""
    zeroes_first: bool = False
    """Whether position 0 reads zeros in place of an embedding, as MiMo-7B's heads do in engines."""
    num_draft: int = 3
    """Maximum number of tokens drafted per round, in a chain."""
    length: str = "fixed"
    """Draft-length policy: a name of draftsmith/length/policies.py, and its number."""

    def __post_init__(self) -> None:
        check_at_least(self, 1, "num_draft", most=MAX_NODES)
        check_at_least(self, 1, "num_heads", most=MAX_HEADS)
        check_at_least(self, 0, "shortlist")
        check_model(self.model)
        policies.make(self.length)

    @property
    def supports_early_stop(self) -> bool:
        return True


class Head(KeepsPrecision):
    """The norms, the projection and the decoder layer, between the target's embedding and its LM head, both frozen."""

    target: Target
    block: Target
    """The decoder layer and the norm after it, run over drafts as targets are, with a cache of its own."""

    def __init__(self, config: Config, target: Target) -> None:
        super().__init__()
        object.__setattr__(self, "target", target)
        width, self.zeroes_first = target.hidden_size, config.zeroes_first
        self.model = _one_layer_model(config.model, target)
        object.__setattr__(self, "block", _as_target(self.model))
        self.embedding_norm, self.hidden_norm = self.block.copy_norm(), self.block.copy_norm()
        self.projection = nn.Linear(2 * width, width, bias=False)

    def run(
        self, tokens_BM: Tensor, hidden_BMD: Tensor, tree: Tree, cache: KVCache, first: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Returns norm(layer(projection([norm(embedding of the tokens); norm(hidden states)]))) [B, M, D], twice.

        It is the hidden state of the predicted token, and the input of the LM head. The tokens are those of the tree's
        nodes from `first` on, whose keys and values are cached.
        """
        embedded_BMD = self.target.model.get_input_embeddings()(tokens_BM).detach()
        if self.zeroes_first and first == 0:
            is_first_B = torch.tensor([length == 0 for length in cache.lengths], device=tokens_BM.device)
            is_first_BM = is_first_B[:, None] & (torch.arange(tokens_BM.shape[1], device=tokens_BM.device) == 0)
            embedded_BMD = embedded_BMD.masked_fill(is_first_BM[..., None], 0)
        joined_BMD = torch.cat([self.embedding_norm(embedded_BMD), self.hidden_norm(hidden_BMD)], dim=-1)
        out = self.block.forward(tokens_BM, tree, cache, first=first, resume_BND=self.projection(joined_BMD))
        normed_BMD = self.block.norm(out.hidden_BND)
        return normed_BMD, normed_BMD

    def final_norm(self) -> nn.Module:
        """Returns the norm after the layer."""
        stack = self.block.find_stack()
        return stack.get_submodule(final_norm(stack) or "")


class Drafter(Head, drafter.Drafter):
    """The first head, and those after it."""

    row_state = ("_state",)
    serving_engines = ("vllm", "sglang")

    def __init__(self, config: Config, target: Target) -> None:
        if target.is_encoder_decoder:
            raise ValueError(f"target {target.name} is an encoder-decoder; MTP heads need a causal target")
        super().__init__(config, target)
        self.config = config
        self.hidden_layers = (target.num_layers,)
        self.joined_width = target.hidden_size
        self.later = nn.ModuleList(Head(config, target) for _ in range(config.num_heads - 1))
        self.shared_head = SharedHead(target, config.shortlist)
        self.to(device=target.device, dtype=target.dtype)

    @property
    def heads(self) -> list[Head]:
        """Returns the heads, in the order in which they draft."""
        return [self, *self.later]

    @property
    def is_chained(self) -> bool:
        return self.config.is_chained

    # The network, for training and drafting

    def join(self, hidden: dict[int, Tensor]) -> Tensor:
        """Returns the output of the target's last layer."""
        return hidden[self.hidden_layers[0]]

    def fuse(self, joined_BND: Tensor) -> Tensor:
        """Returns the target's hidden states that the first head reads [B, N, D], after its final norm or before it."""
        return self.target.norm(joined_BND) if self.config.reads_normed else joined_BND

    # Drafting

    def start(self, session: Session) -> None:
        self._session = session
        self._state = HeadsState(session, self, [head.block.new_cache(len(session.rows)) for head in self.heads])

    def propose(self, budget: int) -> Draft:
        depth = min(budget, self.config.num_draft)
        if depth < 1 or self._state.is_empty:
            return self._session.empty_draft()
        return autoregressive.draft_chain(self._logits, self._session, depth, self.shared_head.shortlist)

    def observe(self, step: Step) -> None:
        self._state.observe(step)

    def _logits(self, tokens_BN: Tensor, tree: Tree, first: int) -> Tensor:
        """Returns the logits [B, 1, W] of the shortlist's tokens after the last node, of index `first`."""
        return self.shared_head.listed(self._state.advance(tokens_BN, first))


class Borrowed(nn.Module):
    """A module of the target, with its attributes, whose weights are not among those of the module around it."""

    _module: nn.Module

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        object.__setattr__(self, "_module", module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_module"], name)

    def forward(self, given: Tensor) -> Tensor:
        return self._module(given)


def _as_target(model: Any) -> Target:
    """Returns a model of one layer as a target; raises ValueError for a layer that drafts cannot be run through."""
    reason = "it keeps a recurrent state"
    try:
        block = Target(model)
        if not (block.is_recurrent or block.is_run_whole):
            return block
        reason = block.abilities.cannot_split or reason
    except ValueError as error:
        reason = str(error)
    raise ValueError(f"a layer of {type(model).__name__} cannot be an MTP head: {reason}")


def _one_layer_model(config: dict[str, Any], target: Target) -> Any:
    """Returns a model of one layer, with the target's embedding and LM head; raises ValueError if it does not fit."""
    settings = {key: value for key, value in config.items() if key != "model_type"}
    if "model_type" not in config:
        raise ValueError("the head's configuration names no model_type")
    for name, expected in (("hidden_size", target.hidden_size), ("vocab_size", target.vocab_size)):
        if settings.get(name, expected) != expected:
            raise ValueError(f"the head's {name} is {settings[name]}; {target.name} has {expected}")
    # Of one token, since an embedding and an LM head of its own are dropped below.
    of_one_token = {"vocab_size": 1, **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))}
    small = AutoConfig.for_model(config["model_type"], **settings | of_one_token)
    if small.num_hidden_layers != 1:
        raise ValueError(f"the head's configuration has {small.num_hidden_layers} layers; it must have one")
    # Made in float32, it keeps in a lower precision what transformers keeps in float32 when it loads such a model.
    model = cast(AutoModelForCausalLM.from_config(small, dtype=torch.float32, trust_remote_code=False), target.dtype)
    model.set_input_embeddings(Borrowed(target.model.get_input_embeddings()))
    model.set_output_embeddings(Borrowed(target.model.get_output_embeddings()))
    model.config.vocab_size = target.vocab_size
    model.to(target.device).eval()
    # Embeddings of positions are not read by a layer that is given its input.
    stack = model.get_decoder()
    read = (find_child(stack, LAYER_LISTS, "list of blocks"), final_norm(stack))
    for name, weight in stack.named_parameters():
        weight.requires_grad_(name.partition(".")[0] in read)
    return model
