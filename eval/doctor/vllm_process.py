"""Runs vLLM over prompts in a process of its own: reads what is asked from one JSON file, writes another beside it.

Its Python has vLLM and draftsmith, and need have nothing else of this repository.
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
ASKED, ANSWER = "asked.json", "answer.json"
METRICS = "vllm:spec_decode_"


def main(folder: Path) -> None:
    os.environ |= ENVIRONMENT  # read as vLLM is imported
    from vllm import LLM, SamplingParams

    asked = json.loads((folder / ASKED).read_text())
    engine = LLM(
        asked["target"],
        dtype=asked["dtype"],
        enforce_eager=True,
        max_model_len=asked["max_tokens"],
        max_num_seqs=3,
        disable_log_stats=False,
        speculative_config=asked["settings"] or None,
    )
    sampling = SamplingParams(temperature=0, max_tokens=asked["num_new"], ignore_eos=True)
    outputs = engine.generate([{"prompt_token_ids": row} for row in asked["prompts"]], sampling, use_tqdm=False)
    found = {one.name.removeprefix(METRICS): one for one in engine.get_metrics() if one.name.startswith(METRICS)}
    answer = {
        "texts": [list(one.outputs[0].token_ids) for one in outputs],
        "counts": {name: getattr(one, "values", None) or one.value for name, one in found.items()},
    }
    (folder / ANSWER).write_text(json.dumps(answer))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
