#!/usr/bin/env bash
# The tests on every version of jax that is supported, each in an environment of its own, one after another.
#
#   scripts/jax_versions.sh [pytest arguments]      such as: scripts/jax_versions.sh tests/compiler -m "not vulkan"
#
# jax 0.10.2 on Python 3.11 (.venv-jax-0.10), 0.11 and 0.12 on Python 3.12. A Python that is not there is installed by
# uv; where it cannot be had, its versions are named and the script exits 1 in the end.
set -uo pipefail
cd "$(dirname "$0")/.."

uv=$(command -v uv || echo .cache/uv/bin/uv)
[ -x "$uv" ] || { echo "jax_versions: there is no uv: run scripts/setup.sh --dev first" >&2; exit 1; }

# The path of a Python, which uv installs where neither it nor pyenv has one; empty where there is none to be had.
find_python() {
    "$uv" python find "$1" 2>/dev/null ||
        ls -d "${PYENV_ROOT:-$HOME/.pyenv}/versions/$1".*/bin/python 2>/dev/null | tail -n 1 | grep . ||
        { "$uv" python install -q "$1" 2>/dev/null && "$uv" python find "$1"; }
}

failed=()
try() { # PYTHON JAX ENVIRONMENT [pytest arguments]
    local python jax=$2 environment=$3
    python=$(find_python "$1") ||
        { failed+=("jax $jax (there is no Python $1: install it, by pyenv or your system)"); return; }
    shift 3
    echo "jax_versions: jax $jax on $python, in $environment"
    UV_PROJECT_ENVIRONMENT=$environment "$uv" sync -q --frozen --python "$python" \
        --extra notebook --extra hf --extra serve --group dev --group shaders &&
        "$uv" pip install -q --python "$environment/bin/python" "jax==$jax" ||
        { failed+=("jax $jax (its environment could not be made)"); return; }
    "$environment/bin/python" -m pytest --slow "$@" || failed+=("jax $jax (pytest)")
}

try 3.11 '0.10.2' .venv-jax-0.10 "$@"
try 3.12 '0.11.*' .venv-jax-0.11 "$@"
try 3.12 '0.12.*' .venv-jax-0.12 "$@"

for what in ${failed[@]+"${failed[@]}"}; do echo "jax_versions: FAILED: $what" >&2; done
[ ${#failed[@]} -eq 0 ]
