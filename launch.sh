#!/usr/bin/env bash
# The front door: makes the environment once, then runs a recipe or the tests in it. See ./launch.sh --help.
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)
venv=$root/.venv
python=$venv/bin/python
pins=constraints.txt
install=install_draftsmith
takes='a minute or so and 2 GB'

usage() {
    cat <<EOF
usage: ./launch.sh setup | test | serving-test | docs | <recipe> [--key value ...]

  setup                makes the environment in .venv; every other command does so when there is none
  test                 ruff, mypy and pytest in up to four processes (-n 0: one); further arguments go to pytest
  serving-test         exports run by vLLM and speculators, in an environment of their own, .venv-serving (4 GB);
                       --engine llama.cpp: by llama.cpp, in .venv-llamacpp (0.1 GB);
                       --engine openvino: by OpenVINO GenAI, in .venv-openvino (2 GB); further arguments go to pytest
  docs                 builds the documentation into site/, strictly; further arguments go to mkdocs build

recipes; each has its own --help:
$(for name in $(recipes); do printf '  %-20s %s\n' "$name" "$(first_docstring_line "$name")"; done)

for every recipe:
  --nproc N            processes, one to a device; default 1
  --launcher NAME      python (the default of one process), torchrun (of several) or deepspeed

PYTHON=/path/to/python names the Python of a new environment, 3.11 or newer.
EOF
}

fail() {
    echo "launch.sh: $*" >&2
    exit 2
}

recipes() { (cd "$root/recipes" && for file in [a-z]*.py; do echo "${file%.py}"; done); }

first_docstring_line() { sed -n '/^"""/{s/"""//g;p;q;}' "$root/recipes/$1.py"; }

unknown_command() {
    local nearest=""
    nearest=$(python3 -c 'import difflib, sys; print(*difflib.get_close_matches(sys.argv[1], sys.argv[2:], n=1))' \
        "$1" setup test serving-test docs $(recipes) 2>/dev/null) || true
    fail "unknown command or recipe '$1'; ${nearest:+did you mean '$nearest'? }./launch.sh --help lists them"
}

# --- The environment ---------------------------------------------------------------------------------------------

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

find_python() {
    local candidate candidates=(python3.11 python3.12 python3.13 python3 python)
    if [[ -n ${PYTHON:-} ]]; then candidates=("$PYTHON"); fi
    for candidate in "${candidates[@]}"; do
        if new_enough "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    fail "needs Python 3.11 or newer, found $("${PYTHON:-python3}" --version 2>/dev/null || echo none);" \
        "install one, or name it: PYTHON=/path/to/python3.11 ./launch.sh setup"
}

# The inputs of an environment: when any of them changes, it is brought up to date.
wanted() { (cd "$root" && pwd -P && cksum "$pins" && sed '/^\[tool\.ruff/,$d' pyproject.toml | cksum); }

is_ready() { [[ -x $python && ! -e $venv.unfinished && $(cat "$venv/installed" 2>/dev/null) == "$(wanted)" ]]; }

ensure_environment() {
    is_ready && return
    (
        if command -v flock >/dev/null && ! flock --nonblock 9; then
            echo "Waiting for another setup of $venv to end."
            flock 9
        fi
        is_ready || make_environment
    ) 9>"$venv.lock"
}

make_environment() {
    local new_python
    # An interrupted setup leaves its mark behind, so that its environment is removed and never used.
    trap 'exit 130' INT TERM
    if [[ -e $venv.unfinished || ! -x $python ]]; then rm -rf "$venv"; fi
    if [[ -d $venv ]]; then
        new_enough "$python" || fail "$venv holds $("$python" --version), too old: remove that folder"
        touch "$venv.unfinished"
    else
        new_python=$(find_python)
        touch "$venv.unfinished"
        echo "Making the environment in $venv with $("$new_python" --version); this takes $takes."
        "$new_python" -m venv "$venv"
    fi
    cd "$root"
    if "$install"; then
        write_bytecode
        wanted >"$venv/installed"
        rm "$venv.unfinished"
    else
        rm "$venv.unfinished"
        fail "the environment could not be made; see above"
    fi
}

install_draftsmith() { install_with_uv || install_with_pip; }

install_with_uv() {
    uv_install --constraints constraints.txt --build-constraints constraints.txt --editable . --group train --group dev
}

uv_install() {
    "$python" -m pip install -qq --disable-pip-version-check --constraint constraints.txt uv || return
    local uv=("$python" -m uv pip install --python "$python")
    # uv does not read pip's settings: this machine's folders of wheels and its index are passed on.
    local value
    for value in ${PIP_FIND_LINKS:-$(pip_setting find-links)}; do uv+=(--find-links "$value"); done
    for value in ${PIP_INDEX_URL:-$(pip_setting index-url)}; do uv+=(--default-index "$value"); done
    "${uv[@]}" "$@"
}

install_with_pip() {
    echo "uv did not succeed; trying pip, which takes a few minutes."
    "$python" -m pip install -qq --disable-pip-version-check 'pip>=25.1' && # older ones know no dependency groups
        "$python" -m pip install --constraint constraints.txt --editable . --group train --group dev
}

# vLLM and speculators require an older transformers than draftsmith declares; draftsmith works with that one too.
install_serving() { install_with_cpu_torch && uv_install --no-deps --editable .; }

install_with_cpu_torch() {
    local index=https://download.pytorch.org/whl/cpu
    uv_install --requirements "$pins" ||
        uv_install --requirements "$pins" --extra-index-url "$index" --index-strategy unsafe-best-match || return
    # These are built for CUDA, and beside them transformers can import no model.
    "$python" -m uv pip uninstall --python "$python" torchaudio torchcodec torchvision
}

install_llama_cpp() { uv_install --requirements "$pins"; }

install_docs() { uv_install --constraints constraints.txt --group docs; }

# Makes the environment .venv-NAME by the function INSTALL from requirements-NAME.txt, and goes to the root.
use_environment() {
    venv=$root/.venv-$1
    python=$venv/bin/python
    pins=requirements-$1.txt
    install=$2
    takes=$3
    ensure_environment
    cd "$root"
}

# Where PYTHONDONTWRITEBYTECODE is set, as in many containers, every start would otherwise compile torch again.
write_bytecode() {
    local packages='datasets, deepspeed, matplotlib.pyplot, peft, transformers.trainer, wandb'
    PYTHONDONTWRITEBYTECODE="" "$python" -c "import $packages" &>/dev/null || true
}

pip_setting() { "$python" -m pip config get "global.$1" 2>/dev/null || true; }

# --- Running -----------------------------------------------------------------------------------------------------

has_gpu() { nvidia-smi -L &>/dev/null || rocminfo &>/dev/null; }

free_port() { "$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }

run_recipe() {
    local nproc=1 launcher="" runner command=("$root/recipes/$1.py")
    shift
    while (($#)); do
        case $1 in
            --nproc | --launcher)
                (($# > 1)) || fail "$1 needs a value"
                printf -v "${1#--}" %s "$2"
                shift
                ;;
            --nproc=*) nproc=${1#*=} ;;
            --launcher=*) launcher=${1#*=} ;;
            *) command+=("$1") ;;
        esac
        shift
    done
    [[ $nproc =~ ^[1-9][0-9]*$ ]] || fail "--nproc takes a whole number of processes, not '$nproc'"
    if [[ -z $launcher ]]; then
        if ((nproc > 1)); then launcher=torchrun; else launcher=python; fi
    fi
    case $launcher in
        python)
            ((nproc == 1)) || fail "--launcher python runs one process; for $nproc take torchrun or deepspeed"
            runner=()
            ;;
        torchrun) runner=(-m torch.distributed.run --standalone --nproc-per-node "$nproc") ;;
        deepspeed) runner=(-m deepspeed.launcher.runner --num_gpus "$nproc" --master_port) ;;
        *) fail "--launcher is python, torchrun or deepspeed, not '$launcher'" ;;
    esac
    ensure_environment
    if [[ $launcher == deepspeed ]]; then runner+=("$(free_port)"); fi
    if ! has_gpu; then
        export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu}
        # Ranks that each start a thread for every core slow each other down many times over.
        if ((nproc > 1)); then export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(threads_per_process "$nproc")}; fi
    fi
    export PATH="$venv/bin:$PATH" # ninja, and the `python` that sweep agents call
    exec "$python" ${runner[@]+"${runner[@]}"} "${command[@]}"
}

threads_per_process() {
    local threads=$(($(getconf _NPROCESSORS_ONLN) / $1))
    echo $((threads > 0 ? threads : 1))
}

case ${1:-} in
    "")
        usage >&2
        exit 2
        ;;
    -h | --help | help) usage ;;
    setup)
        (($# == 1)) || fail "setup takes no further arguments"
        ensure_environment
        echo "Ready: $("$python" --version) in $venv"
        ;;
    test)
        ensure_environment
        cd "$root"
        exec "$python" -m pytest -q --numprocesses logical --maxprocesses 4 --dist loadfile "${@:2}"
        ;;
    docs)
        ensure_environment
        cd "$root"
        "$python" -c 'import material, mkdocstrings_handlers.python' 2>/dev/null || install_docs
        NO_MKDOCS_2_WARNING=1 exec "$python" -m mkdocs build --strict "${@:2}"
        ;;
    serving-test)
        shift
        engine=vllm
        case ${1:-} in
            --engine)
                (($# > 1)) || fail "--engine needs a value: vllm, llama.cpp or openvino"
                engine=$2
                shift 2
                ;;
            --engine=*)
                engine=${1#*=}
                shift
                ;;
        esac
        case $engine in
            vllm)
                use_environment serving install_serving 'some minutes and 4 GB'
                exec "$python" -m pytest -q -m "not slow" --ignore tests/serving/test_llama_cpp.py \
                    --ignore tests/serving/test_openvino.py tests/serving tests/export/test_export_speculators.py "$@"
                ;;
            llama.cpp)
                # llama.cpp needs nothing of draftsmith's: the tests run here, and start its Python for each export.
                ensure_environment
                tester=$python
                use_environment llamacpp install_llama_cpp 'half a minute and 0.1 GB'
                export DRAFTSMITH_LLAMA_CPP_PYTHON=$python
                exec "$tester" -m pytest -q -n 0 -m serving tests/serving/test_llama_cpp.py "$@"
                ;;
            openvino)
                # optimum-intel needs an older transformers: the tests run here, and start its programs for each export.
                ensure_environment
                tester=$python
                use_environment openvino install_with_cpu_torch 'a minute or so and 2 GB'
                export DRAFTSMITH_OPENVINO_PYTHON=$python
                exec "$tester" -m pytest -q -n 0 -m serving tests/serving/test_openvino.py "$@"
                ;;
            *) fail "--engine is vllm, llama.cpp or openvino, not '$engine'" ;;
        esac
        ;;
    *)
        name=${1//-/_}
        [[ -f $root/recipes/$name.py ]] || unknown_command "$1"
        run_recipe "$name" "${@:2}"
        ;;
esac
