#!/usr/bin/env bash
# Make .venv with the locked dependencies, from nothing but python3 (3.11 or newer).
#
#   scripts/setup.sh          what training, the chat, the server and the notebooks need
#   scripts/setup.sh --dev    and what the tests and the shader build need
set -euo pipefail
cd "$(dirname "$0")/.."

fail() { echo "setup: $*" >&2; exit 1; }

command -v python3 >/dev/null || fail "python3 is missing: install Python 3.11 or newer"
python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "python3 is $(python3 -V): Python 3.11 or newer is needed"

uv=$(command -v uv || true)
if [ -z "$uv" ]; then
    uv=.cache/uv/bin/uv
    if [ ! -x "$uv" ]; then
        # Debian parts ensurepip, which venv needs, from python3.
        if ! python3 -c 'import ensurepip' 2>/dev/null; then
            if [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null; then
                apt-get update -q >/dev/null
                DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends python3-venv >/dev/null
            else
                fail "python3 has no ensurepip: run 'apt-get install python3-venv' as root, or install uv"
            fi
        fi
        python3 -m venv .cache/uv
        .cache/uv/bin/python -m pip install -q --disable-pip-version-check 'uv>=0.8'
    fi
fi

options=(--extra notebook --extra serve)
if [ "${1:-}" = --dev ]; then
    options+=(--extra hf --group dev --group shaders --compile-bytecode)  # the tests start Python a hundred times
elif [ $# -gt 0 ]; then
    fail "unknown argument $1: give --dev or nothing"
fi
UV_PYTHON_DOWNLOADS=never "$uv" sync -q --frozen --python "$(command -v python3)" "${options[@]}"
echo "setup: .venv is ready ($(.venv/bin/python -V))"
