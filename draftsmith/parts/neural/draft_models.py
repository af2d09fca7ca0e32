"""The transformers model of a drafter that is a small LM, tied to the target's modules if its configuration says so.

Shape suffixes: B rows, M positions, D width of the model, W tokens with logits.
"""

from typing import Any, Protocol

from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from draftsmith.core.target import Target
from draftsmith.parts.neural.shortlist import Shortlist, ShortlistHead
from draftsmith.parts.neural.tied_heads import TargetEncoder, TiedEmbedding, TiedHead


class ModelConfig(Protocol):
    """The settings of a drafter's configuration that describe its model."""

    @property
    def model(self) -> dict[str, Any]:
        """The transformers configuration, including `model_type`."""

    @property
    def rank(self) -> int:
        """If not 0, the rank of a head tied to the target's."""

    @property
    def shortlist(self) -> int:
        """If not 0, the number of tokens with logits."""


def draft_model(config: ModelConfig, target: Target, *, target_encoder: bool = False) -> Any:
    """Returns a model with random weights; raises ValueError for one that does not fit the target.

    With `target_encoder` an encoder-decoder's encoder is the target's.
    """
    settings = {key: value for key, value in config.model.items() if key != "model_type"}
    if "model_type" not in config.model:
        raise ValueError("the draft model's configuration names no model_type")
    if settings.get("vocab_size") != target.vocab_size:
        raise ValueError(
            f"the draft model's vocabulary has {settings.get('vocab_size')} tokens and the target's"
            f" {target.vocab_size}; they must be the same"
        )
    made = AutoConfig.for_model(config.model["model_type"], **settings)
    if made.is_encoder_decoder and not target.is_encoder_decoder:
        raise ValueError(f"the draft model is an encoder-decoder and target {target.name} is not")
    model = (AutoModelForSeq2SeqLM if made.is_encoder_decoder else AutoModelForCausalLM).from_config(
        made, dtype=target.dtype, trust_remote_code=False
    )
    width = made.get_text_config(decoder=True).hidden_size
    if config.rank:
        head = TiedHead(target, width, config.rank, shortlist=config.shortlist)
        model.set_input_embeddings(TiedEmbedding(head, width))
        model.set_output_embeddings(head)
    elif config.shortlist:
        model.set_output_embeddings(ShortlistHead(model.get_output_embeddings(), config.shortlist))
    if made.is_encoder_decoder and target_encoder:
        model.set_encoder(TargetEncoder(target, width))
    return model


def shortlist_of(model: Any, target: Target) -> Shortlist:
    """Returns the tokens that a model has logits for."""
    head = model.get_output_embeddings()
    return head.shortlist if hasattr(head, "shortlist") else Shortlist(0, target.vocab_size)


def listed_tokens(draft_model: Target) -> Shortlist | None:
    """Returns the shortlist of a draft model; None if `listed_logits` are of all tokens."""
    shortlist = shortlist_of(draft_model.model, draft_model)
    # A draft model that is run whole gives logits of all tokens.
    return None if shortlist.is_whole or draft_model.is_run_whole else shortlist


def listed_logits(draft_model: Target, hidden_BMD: Tensor, vocabulary: Shortlist | None) -> Tensor:
    """Returns the logits [B, M, W] of the tokens in `vocabulary`, which `listed_tokens` returned, or of all tokens."""
    if vocabulary is None:
        return draft_model.logits(hidden_BMD)
    head, normed_BMD = draft_model.model.get_output_embeddings(), draft_model.norm(hidden_BMD)
    return head.folded(normed_BMD) if isinstance(head, TiedHead) else head.listed(normed_BMD)
