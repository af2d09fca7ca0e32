"""The choice of a token that occurs in no text, for drafters that need one: a mask."""

from typing import Any

from draftsmith import Target
from draftsmith.loading.model_info import TargetInfo


def unused_token(target: Target | TargetInfo) -> int:
    """Returns a token of the target's vocabulary that stands in no text, or seldom.

    It is, in this order: the tokenizer's mask token; the first token that the embedding has beyond the tokenizer's; a
    pad token that ends no text; the special token with the highest id that begins and ends no text; the last token.
    """
    tokenizer: Any = target.tokenizer
    if tokenizer is None:
        return target.vocab_size - 1
    if (token := tokenizer.mask_token_id) is not None and token < target.vocab_size:
        return int(token)
    if len(tokenizer) < target.vocab_size:
        return len(tokenizer)
    in_texts = {*target.eos_token_ids, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}
    if (token := tokenizer.pad_token_id) is not None and token not in in_texts:
        return int(token)
    special = [token for token, added in tokenizer.added_tokens_decoder.items() if added.special]
    free = [token for token in special if token not in in_texts and token < target.vocab_size]
    return max(free, default=target.vocab_size - 1)
