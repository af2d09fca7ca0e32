"""Generates pseudo-data with an OpenAI-compatible server (vLLM, SGLang, ...) through /v1/completions."""

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from transformers import PreTrainedTokenizerBase

from data.sources.chat import ChatFormat
from data.writers import OWN_SETTINGS, Completion, GenerationBatch, Origin, PseudoDataSettings, derive_seed
from draftsmith.inputs.generation_config import parse_config
from draftsmith.loading.model_info import tokenizer_hash

RETRIED_STATUS = {408, 409, 425, 429, 500, 502, 503, 504}
TIMEOUT_S = 600.0
FIRST_WAIT_S = 0.5
SERVER_NAMES = {
    "repetition_penalty": "repetition_penalty",
    "min_p": "min_p",
    "min_new_tokens": "min_tokens",
    "stop_strings": "stop",
}
"""Settings of a generation config that vLLM and SGLang take, and what they call them."""


class ServerWriter:
    """Requests completions over HTTP, `num_in_flight` at a time, each tried up to `attempts` times.

    Prompts are sent as token ids, or as text if `as_text`. Completions come back as token ids if the server supports
    `return_token_ids` (vLLM, SGLang); otherwise their text is tokenized again, which may give other tokens than those
    sampled. An end token that they lack is added: the one that the server names (`stop_reason` of vLLM, `matched_stop`
    of SGLang), or that of `end_ids`, the generation config's, with which the chat template ends an answer. The API key
    is $DRAFTSMITH_SERVER_KEY. Raises ValueError if no server answers at `url`.
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
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"--server {url}: expected an address like http://localhost:8000")
        self.url = url.rstrip("/").removesuffix("/v1")
        self.tokenizer = tokenizer
        self.num_in_flight = num_in_flight
        self.as_text = as_text
        self.attempts = attempts
        self._chat = ChatFormat(tokenizer=tokenizer, end_ids=frozenset(end_ids))
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
        """Yields the completions of each batch in turn; the requests of the whole shard run concurrently."""
        with ThreadPoolExecutor(self.num_in_flight) as pool:
            requests = [
                [pool.submit(self._complete, batch, row, settings) for row in range(len(batch.prompts))]
                for batch in shard
            ]
            try:
                for batch_requests in requests:
                    yield [request.result() for request in batch_requests]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

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
        request |= {SERVER_NAMES[name]: value for name, value in self.recorded_config(settings).items()}
        answer = self._request("/v1/completions", request)
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
            raise ValueError(f"the answer of {self.url} is not a completion: {json.dumps(answer):.200}") from None
        if not ids:
            raise ValueError(f"{self.url} returned an empty completion for the prompt {prompt.source}")
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
        models = self._request("/v1/models", None, attempts=1).get("data") or []
        if len(models) != 1:
            names = ", ".join(str(model.get("id")) for model in models) or "none"
            raise ValueError(f"{self.url} serves these models: {names}; name one with --server-model")
        return str(models[0]["id"])

    def _request(self, path: str, body: dict[str, Any] | None, *, attempts: int | None = None) -> dict[str, Any]:
        """Returns the server's JSON answer, retrying temporary errors with doubling waits.

        Raises ValueError if the server rejects the request or all attempts fail.
        """
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("DRAFTSMITH_SERVER_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        attempts = attempts or self.attempts
        reason = ""
        for attempt in range(attempts):
            if attempt:
                time.sleep(FIRST_WAIT_S * 2 ** (attempt - 1))
            try:
                request = urllib.request.Request(self.url + path, data=data, headers=headers)
                with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
                    return json.loads(response.read())
            except urllib.error.HTTPError as error:
                reason = f"{error.code} {' '.join(error.read().decode(errors='replace').split()):.300}"
                if error.code not in RETRIED_STATUS:
                    raise ValueError(f"{self.url}{path} rejected the request: {reason}") from None
            except (OSError, ValueError, http.client.HTTPException) as error:  # no connection, or it was cut short
                reason = str(error)
        tries = f" after {attempts} attempts" if attempts > 1 else ""
        raise ValueError(f"no valid answer from {self.url}{path}{tries}: {reason}")
