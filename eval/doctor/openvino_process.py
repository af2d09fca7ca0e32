"""Runs OpenVINO GenAI in its own process: reads a request from a JSON file and writes the response beside it.

Its interpreter needs openvino-genai and numpy, neither draftsmith nor torch.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

REQUEST, RESPONSE = "request.json", "response.json"
PIPELINE_SETTINGS = ("draft_model", "prompt_lookup")
"""Settings of an export that the pipeline gets; the others are those of each call."""


def main(folder: Path) -> None:
    import openvino_genai

    request = json.loads((folder / REQUEST).read_text())
    properties = request["properties"] | {"INFERENCE_NUM_THREADS": request["num_threads"]}
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.enable_prefix_caching = False
    settings = dict(request["settings"])
    own = {name: settings.pop(name) for name in PIPELINE_SETTINGS if name in settings}
    if "draft_model" in own:
        own["draft_model"] = openvino_genai.draft_model(own["draft_model"], "CPU", **properties)
    pipeline = openvino_genai.LLMPipeline(
        request["target"], "CPU", scheduler_config=scheduler, ATTENTION_BACKEND="PA", **own, **properties
    )
    is_timed = request["is_timed"]
    answers = [_answer(pipeline, prompt, request["num_new"], settings, is_timed) for prompt in request["prompts"]]
    if is_timed:
        for prompt, answer in zip(request["prompts"], answers, strict=True):
            first = _answer(pipeline, prompt, 1, settings, is_timed)
            answer["cpu_s"] -= first["cpu_s"]
            answer["wall_s"] -= first["wall_s"]
    (folder / RESPONSE).write_text(json.dumps({"answers": answers}))


def _answer(pipeline: Any, prompt: list[int], num_new: int, settings: dict[str, Any], is_timed: bool) -> dict[str, Any]:
    """Returns the greedy answer to a prompt, the number of tokens of each step, and the time that it took."""
    import numpy as np
    import openvino

    options = settings | {"max_new_tokens": num_new, "do_sample": False, "ignore_eos": is_timed}
    before_s, cpu_before_s = time.perf_counter(), time.process_time()
    found = pipeline.generate(openvino.Tensor(np.array([prompt], dtype=np.int64)), **options)
    cpu_s, wall_s = time.process_time() - cpu_before_s, time.perf_counter() - before_s
    metrics = found.extended_perf_metrics
    # Without a draft model there are no extended metrics.
    steps = (metrics.main_model_metrics if metrics else found.perf_metrics).raw_metrics.m_batch_sizes
    return {
        "text": list(found.tokens[0]),
        "sizes": list(steps),
        "num_accepted": metrics.get_num_accepted_tokens() if metrics else None,
        "num_drafted": metrics.get_num_draft_tokens() if metrics else None,
        "cpu_s": cpu_s,
        "wall_s": wall_s,
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]))
