"""The text model inside a model of text and images, and the head of a model alone."""

from typing import Any

from torch import Tensor, nn

from draftsmith.core.views import HiddenStateOutput, shallow_copy


def text_model(model: Any) -> Any:
    """Returns the model of text, with its head, inside a model of text and images; itself if it has the head."""
    decoder = getattr(model, "get_decoder", lambda: None)()
    has_head = decoder not in (None, model) and getattr(decoder, "get_output_embeddings", lambda: None)() is not None
    return decoder if has_head else model


def head_view(model: Any, stack: nn.Module) -> Any:
    """Returns a view of the model that applies its head, scaling and soft-capping to normed hidden states."""
    model = text_model(model)
    copied = shallow_copy(model)
    children = ((name, child) for name, child in model._modules.items() if child is not None)
    holders = [name for name, child in children if any(part is stack for part in child.modules())]
    if not holders:
        raise ValueError(f"{type(model).__name__} has no base model that draftsmith supports")
    name = holders[0]
    copied._modules[name] = _IdentityModel(model._modules[name])
    return copied


class _IdentityModel(nn.Module):
    """Replaces a base model or decoder: returns its input embeddings as hidden states, and shows its attributes."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self._original = (original,)  # hidden from the module, whose parameters it would become

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_original"][0], name)

    def forward(
        self, *_: Any, inputs_embeds: Tensor | None = None, decoder_inputs_embeds: Tensor | None = None, **__: Any
    ) -> HiddenStateOutput:
        given = inputs_embeds if inputs_embeds is not None else decoder_inputs_embeds
        return HiddenStateOutput(last_hidden_state=given)

    @property
    def decoder(self) -> "_IdentityModel":
        return self
