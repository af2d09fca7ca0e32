"""Tokenizers of every supported kind, and translations between their vocabularies and a tiny target's.

Each has a beginning-of-text and an end-of-text token; some cannot spell every text.
"""

from functools import cache

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from draftsmith import Target
from draftsmith.drafters.translated.spelling import BOS, EOS, Translation, Vocabulary
from tests.support.text import TEXT, text_target, trained_tokenizer

LETTERS = "ab \n(é語😀"


def marked_bpe() -> Tokenizer:
    """Returns a tokenizer like Llama 2's: marked spaces, one before each text, and byte fallback."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    letters = ["▁", *sorted(set("abdefinrst(:"))]
    merges = [("▁", "a"), ("d", "e"), ("de", "f"), ("▁", "def"), ("▁", "▁"), ("▁▁", "▁▁"), ("i", "n")]
    for token in (*letters, *("".join(pair) for pair in merges)):
        vocabulary.setdefault(token, len(vocabulary))
    bpe = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    bpe.decoder = decoders.Sequence(steps)
    bpe.add_special_tokens(["<unk>", "<s>", "</s>"])
    return bpe


def unigram() -> Tokenizer:
    """Returns a tokenizer like T5's: marked spaces, and unknown characters are lost."""
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    special = ["<unk>", "<s>", "</s>"]
    options = {"vocab_size": 200, "special_tokens": special, "unk_token": "<unk>", "show_progress": False}
    made.train_from_iterator([TEXT], trainers.UnigramTrainer(**options))
    return made


def characters() -> Tokenizer:
    """Returns a tokenizer of one token per character; unknown characters are lost."""
    known = ["<unk>", "<s>", "</s>", *sorted(set(TEXT) | set(LETTERS))]
    made = Tokenizer(models.WordLevel({token: number for number, token in enumerate(known)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    made.decoder = decoders.Fuse()
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    return made


@cache
def tokenizer(name: str) -> PreTrainedTokenizerFast:
    if name.startswith("bytes"):
        return trained_tokenizer(vocab_size=int(name.removeprefix("bytes-")))
    made = {"marked": marked_bpe, "unigram": unigram, "characters": characters}[name]()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


TOKENIZERS = ("bytes-259", "bytes-300", "bytes-600", "marked", "unigram", "characters")
EXACT = ("bytes-259", "bytes-300", "bytes-600", "marked")
"""Those that can spell every text, and parts of characters."""


@cache
def shared_target() -> Target:
    return text_target(seed=3)


def vocabulary(name: str) -> Vocabulary:
    own = tokenizer(name)
    return Vocabulary.of(own, len(own), {own.bos_token_id: BOS, own.eos_token_id: EOS})


@cache
def between(name: str, lookback: int = 10) -> Translation:
    theirs = trained_tokenizer()
    special = {theirs.bos_token_id: BOS, theirs.eos_token_id: EOS}
    return Translation(vocabulary(name), Vocabulary.of(theirs, len(theirs), special), lookback)
