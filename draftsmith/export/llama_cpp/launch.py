"""Commands that run an export: `llama-server`, and the same in Python by the package xllamacpp."""

import shlex
from typing import Any

from draftsmith.export.launch import Launch
from draftsmith.export.llama_cpp.targets import ServedTarget

FIELDS = {
    "model": "model.path",
    "spec-draft-model": "speculative.draft.mparams.path",
    "spec-draft-n-max": "speculative.draft.n_max",
    "spec-draft-p-min": "speculative.draft.p_min",
    "spec-draft-sampling": "speculative.draft.probabilistic",
    "no-spec-draft-backend-sampling": "speculative.draft.backend_sampling",
    "spec-ngram-simple-size-n": "speculative.ngram_simple.size_n",
    "spec-ngram-simple-size-m": "speculative.ngram_simple.size_m",
    "lookup-cache-dynamic": "speculative.ngram_cache.lookup_cache_dynamic",
}
"""llama-server's flags that exports use, without dashes, and xllamacpp's fields for them."""
TYPES = "speculative.types"


def llama_cpp_launch(
    served: ServedTarget, kind: str, settings: dict[str, Any] | None = None, *, notes: tuple[str, ...] = ()
) -> Launch:
    """Returns the command for a drafter of llama.cpp's type `kind` (--spec-type), with `settings` as further flags.

    Of a flag that takes no value, the value is True.
    """
    flags = {"spec-type": kind} | (settings or {})
    words = [f"--{flag}" + ("" if value is True else f" {shlex.quote(str(value))}") for flag, value in flags.items()]
    path = str(served.path)
    lines = [
        "import xllamacpp",
        "params = xllamacpp.CommonParams()",
        *(_assignment(field, value) for field, value in fields({"model": path} | flags).items()),
        "server = xllamacpp.Server(params)",
        'print(server.handle_completions({"prompt": "some text", "max_tokens": 64, "temperature": 0}))',
    ]
    return Launch(
        command=f"llama-server --model {shlex.quote(path)} {' '.join(words)}",
        python="\n".join(lines),
        target=path,
        settings=flags,
        notes=notes,
    )


def fields(settings: dict[str, Any]) -> dict[str, Any]:
    """Returns the values of xllamacpp's `CommonParams` for llama-server's flags, by the names of the fields.

    The type of drafter is a list of names of `xllamacpp.common_speculative_type`.
    """
    found: dict[str, Any] = {}
    for flag, value in settings.items():
        if flag == "spec-type":
            found[TYPES] = [f"COMMON_SPECULATIVE_TYPE_{value.upper().replace('-', '_')}"]
        elif flag == "spec-draft-sampling":
            found[FIELDS[flag]] = value == "probabilistic"
        else:
            found[FIELDS[flag]] = not value if flag.startswith("no-") else value
    return found


def _assignment(field: str, value: Any) -> str:
    if field == TYPES:
        value = ", ".join(f"xllamacpp.common_speculative_type.{name}" for name in value)
        return f"params.{field} = [{value}]"
    return f"params.{field} = {value!r}"
