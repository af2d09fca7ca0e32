"""Writes texts with vLLM alone, for benchmarks/pseudo_data.py: reads request.json in a folder, writes response.json.

    .venv-serving/bin/python benchmarks/vllm_text.py FOLDER

Its interpreter needs vLLM only. The first prompts are written once before the clock starts.
"""

import json
import os
import resource
import sys
import time
from pathlib import Path


def main(folder: Path) -> None:
    # vLLM reads these when it is imported.
    os.environ |= {
        "VLLM_CPU_KVCACHE_SPACE": "4",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    from vllm import LLM, SamplingParams

    request = json.loads((folder / "request.json").read_text())
    engine = LLM(
        request["target"],
        dtype=request["dtype"],
        max_num_seqs=request["batch_size"],
        max_model_len=request["max_tokens"],
        enable_prefix_caching=False,
    )
    sampling = SamplingParams(temperature=request["temperature"], max_tokens=request["max_new_tokens"])
    prompts = [{"prompt_token_ids": ids} for ids in request["prompts"]]
    engine.generate(prompts[:2], sampling, use_tqdm=False)
    began = time.perf_counter()
    outputs = engine.generate(prompts, sampling, use_tqdm=False)
    seconds = time.perf_counter() - began
    num_tokens = sum(len(one.outputs[0].token_ids) for one in outputs)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    (folder / "response.json").write_text(json.dumps([num_tokens / seconds, peak, len(outputs)]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
