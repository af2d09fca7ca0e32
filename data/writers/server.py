"""Generates pseudo-data with OpenAI-compatible servers (vLLM, SGLang, ...) through /v1/completions."""

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from transformers import PreTrainedTokenizerBase

from data.sources.chat import ChatFormat
from data.writers import OWN_SETTINGS, Completion, GenerationBatch, Origin, PseudoDataSettings, derive_seed
from data.writers.server_pool import ServerPool
from draftsmith.inputs.generation_config import parse_config
from draftsmith.loading.model_info import tokenizer_hash

SERVER_NAMES = {
    "repetition_penalty": "repetition_penalty",
    "min_p": "min_p",
    "min_new_tokens": "min_tokens",
    "stop_strings": "stop",
    "eos_token_id": "stop_token_ids",
}
"""Settings of a generation config that vLLM and SGLang take, and what they call them."""


class ServerWriter:
    """Requests completions over HTTP from servers of one model, `num_in_flight` at a time from each.

    `url` is an address, or several separated by commas; a server that gives no valid answer `attempts` times in a row
    is left out, and the others take its requests.

    Prompts are sent as token ids, or as text if `as_text`. Completions come back as token ids if the server supports
    `return_token_ids` (vLLM, SGLang); otherwise their text is tokenized again, which may give other tokens than those
    sampled. An end token that they lack is added: the one that the server names (`stop_reason` of vLLM, `matched_stop`
    of SGLang), or that of `end_ids`, the generation config's, with which the chat template ends an answer. The API key
    is $DRAFTSMITH_SERVER_KEY. Raises ValueError if a server does not answer, or serves another model.
    """

    def __init__(
        self,
        url: str,
        tokenizer: PreTrainedTokenizerBase,
        *,
        model: str = "",
        num_in_flight: int = 16,
        as_text: bool = False,
        end_ids: Sequence[int] = (),
        attempts: int = 7,
    ) -> None:
        urls = [one.strip() for one in url.split(",") if one.strip()]
        self.pool = ServerPool(urls, num_in_flight=num_in_flight, attempts=attempts)
        self.num_shards_at_once = len(urls) + 1  # the requests of a shard that ends do not keep all servers busy
        self.tokenizer = tokenizer
        self.as_text = as_text
        self._requests = ThreadPoolExecutor(num_in_flight * len(urls))
        self._chat = ChatFormat(tokenizer=tokenizer, end_ids=frozenset(end_ids))
        self.name = " or ".join(self.pool.urls)
        self.model = model or self._only_model()
        self.origin = Origin(
            target=self.model,
            target_fingerprint=None,
            tokenizer_hash=tokenizer_hash(tokenizer),
            server_model=self.model,
        )

    def recorded_config(self, settings: PseudoDataSettings) -> dict[str, Any]:
        """Returns the settings of the generation config; raises ValueError for those that servers do not take."""
        found = parse_config(settings.generation_config)
        if isinstance(found, str):
            raise ValueError(
                "generation_config 'model' is not supported with a server, which reads the model's own itself or not;"
                ' name the settings, such as {"repetition_penalty": 1.1}'
            )
        found = {name: value for name, value in (found or {}).items() if name not in OWN_SETTINGS}
        for name in found:
            if name not in SERVER_NAMES:
                raise ValueError(
                    f"generation_config sets {name}, which is not supported with a server; it may set"
                    f" {', '.join(SERVER_NAMES)}"
                )
        return found

    def write(self, shard: Sequence[GenerationBatch], settings: PseudoDataSettings) -> Iterator[list[Completion]]:
        """Yields the completions of each batch in turn; requests run concurrently, those of earlier calls first."""
        requests = [
            [self._requests.submit(self._complete, batch, row, settings) for row in range(len(batch.prompts))]
            for batch in shard
        ]
        for batch_requests in requests:
            yield [request.result() for request in batch_requests]

    def close(self) -> None:
        """Sends no more requests."""
        self._requests.shutdown(wait=False, cancel_futures=True)

    def _complete(self, batch: GenerationBatch, row: int, settings: PseudoDataSettings) -> Completion:
        prompt = batch.prompts[row]
        request = {
            "model": self.model,
            "prompt": self._as_text(prompt.ids) if self.as_text else prompt.ids,
            "max_tokens": settings.max_new_tokens,
            "temperature": batch.temperature,
            "top_p": settings.top_p,
            "seed": derive_seed(batch.seed, row) % 2**31,
            "return_token_ids": True,
        }
        if settings.top_k:
            request["top_k"] = settings.top_k
        for name, value in self.recorded_config(settings).items():
            request[SERVER_NAMES[name]] = [value] if name == "eos_token_id" and isinstance(value, int) else value
        answer = self.pool.post("/v1/completions", request)
        try:
            choice = answer["choices"][0]
            end = self._end_token(choice) if choice["finish_reason"] == "stop" else None
            ids = choice.get("token_ids")
            is_retokenized = ids is None
            if ids is None:
                ids = self.tokenizer(choice["text"], add_special_tokens=False, verbose=False)["input_ids"]
            if end is not None and ids[-1:] != [end]:
                ids = [*ids, end]
        except (KeyError, IndexError, TypeError):
            raise ValueError(f"the answer of {self.name} is not a completion: {json.dumps(answer):.200}") from None
        if not ids:
            raise ValueError(f"{self.name} returned an empty completion for the prompt {prompt.source}")
        return Completion(ids=list(ids), ended=end is not None, is_retokenized=is_retokenized)

    def _end_token(self, choice: dict[str, Any]) -> int | None:
        """Returns the token at which the target ended, None for a stop string."""
        reason = choice.get("stop_reason", choice.get("matched_stop"))
        if isinstance(reason, int):
            return reason
        if isinstance(reason, str):
            found = self.tokenizer.convert_tokens_to_ids(reason)
            return found if found in self._chat.ends else None
        # vLLM gives None for the tokenizer's own end token, and the id of any other.
        return self.tokenizer.eos_token_id if "stop_reason" in choice else self._chat.turn_end

    def _as_text(self, ids: list[int]) -> str:
        """Returns the prompt's text without the special tokens that the server's tokenizer adds itself."""
        added = self.tokenizer("")["input_ids"]
        if added and ids[: len(added)] == added:
            ids = ids[len(added) :]
        return self.tokenizer.decode(ids)

    def _only_model(self) -> str:
        found = []
        for url, answer in zip(self.pool.urls, self.pool.ask_each("/v1/models"), strict=True):
            models = [str(model.get("id")) for model in answer.get("data") or []]
            if len(models) != 1:
                raise ValueError(
                    f"{url} serves these models: {', '.join(models) or 'none'}; name one with --server-model"
                )
            found.append(models[0])
        if len(set(found)) > 1:
            served = ", ".join(f"{url} {model}" for url, model in zip(self.pool.urls, found, strict=True))
            raise ValueError(
                f"the servers must serve the same model, and serve: {served}; name one with --server-model"
            )
        return found[0]
