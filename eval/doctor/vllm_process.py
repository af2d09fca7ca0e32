"""Runs vLLM over prompts in its own process: reads a request from a JSON file and writes the response beside it.

Its interpreter needs vLLM and draftsmith, and nothing else of this repository.
"""

import json
import os
import sys
from pathlib import Path

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
REQUEST, RESPONSE = "request.json", "response.json"
METRICS = "vllm:spec_decode_"


def main(folder: Path) -> None:
    os.environ |= ENVIRONMENT  # vLLM reads them on import
    from vllm import LLM, SamplingParams

    request = json.loads((folder / REQUEST).read_text())
    engine = LLM(
        request["target"],
        dtype=request["dtype"],
        enforce_eager=True,
        max_model_len=request["max_tokens"],
        max_num_seqs=3,
        disable_log_stats=False,
        speculative_config=request["settings"] or None,
    )
    sampling = SamplingParams(temperature=0, max_tokens=request["num_new"], ignore_eos=True)
    outputs = engine.generate([{"prompt_token_ids": row} for row in request["prompts"]], sampling, use_tqdm=False)
    metrics = {one.name.removeprefix(METRICS): one for one in engine.get_metrics() if one.name.startswith(METRICS)}
    response = {
        "texts": [list(one.outputs[0].token_ids) for one in outputs],
        "counts": {name: getattr(one, "values", None) or one.value for name, one in metrics.items()},
    }
    (folder / RESPONSE).write_text(json.dumps(response))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
