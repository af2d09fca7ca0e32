"""Runs llama.cpp over prompts in its own process: reads a request from a JSON file and writes the response beside it.

Its interpreter needs xllamacpp and nothing else: neither draftsmith nor torch.
"""

import json
import re
import sys
import time
from pathlib import Path
from typing import Any

REQUEST, RESPONSE = "request.json", "response.json"
TYPES, CACHES = "speculative.types", ("cache_type_k", "cache_type_v")
NUM_REPEATS = 5
COUNTER = re.compile(r'^llamacpp:spec_decode_num_(\w+)_total(?:\{position="(\d+)"\})? (\d+)', re.MULTILINE)


def main(folder: Path) -> None:
    import xllamacpp

    request = json.loads((folder / REQUEST).read_text())
    params = xllamacpp.CommonParams()
    params.n_ctx, params.n_parallel = request["num_tokens"], 1
    params.endpoint_metrics, params.warmup, params.verbosity = True, False, 0
    threads = [params.cpuparams, params.cpuparams_batch]
    threads += [params.speculative.draft.cpuparams, params.speculative.draft.cpuparams_batch]
    for one in threads:
        one.n_threads = request["num_threads"]
    if request["is_exact"]:
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        for owner in (params, params.speculative.draft):
            for name in CACHES:
                setattr(owner, name, xllamacpp.ggml_type.GGML_TYPE_F32)
    for field, value in request["fields"].items():
        *path, last = field.split(".")
        holder: Any = params
        for name in path:
            holder = getattr(holder, name)
        if field == TYPES:
            value = [getattr(xllamacpp.common_speculative_type, name) for name in value]
        setattr(holder, last, value)
    server = xllamacpp.Server(params)
    answers = [_answer(server, prompt, request["num_new"]) for prompt in request["prompts"]]
    if request["is_timed"]:
        for prompt, answer in zip(request["prompts"], answers, strict=True):
            answer["wall_s"] -= _answer(server, prompt, 1)["wall_s"]
    counts: dict[str, Any] = {"accepted_tokens_per_pos": []}
    for name, position, number in COUNTER.findall(server.handle_metrics()):
        if position:
            counts[name] = [*counts[name], int(number)]
        else:
            counts[name] = int(number)
    times = {size: _batch_s(server, size) for size in request["batch_sizes"]}
    (folder / RESPONSE).write_text(json.dumps({"answers": answers, "counts": counts, "batch_s": times}))


def _answer(server: Any, prompt: Any, num_new: int, **changes: Any) -> dict[str, Any]:
    """Returns the greedy answer to a prompt, with the time that it took."""
    given = {"prompt": prompt, "max_tokens": num_new, "temperature": 0, "seed": 0, "logprobs": 1}
    before_s = time.perf_counter()
    answer = server.handle_completions(given | {"cache_prompt": False} | changes)
    wall_s = time.perf_counter() - before_s
    if "choices" not in answer:
        raise SystemExit(f"llama.cpp answered {json.dumps(answer)[:500]}")
    text = [token["id"] for token in answer["choices"][0]["logprobs"]["content"]]
    return {"text": text, "timings": answer["timings"], "wall_s": wall_s}


def _batch_s(server: Any, size: int) -> float:
    """Returns the least time of a forward of `size` tokens after 64, as in a prompt that is partly known."""
    known, times = [7] * 64, []
    for number in range(NUM_REPEATS):
        _answer(server, known, 1, cache_prompt=True)
        new = [100 + number + token for token in range(size)]
        answer = _answer(server, [*known, *new], 1, cache_prompt=True)
        assert answer["timings"]["prompt_n"] == size
        times.append(answer["wall_s"])
    return min(times)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
