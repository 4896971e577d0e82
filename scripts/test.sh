#!/usr/bin/env bash
# Install what the tests need, lavapipe among it where that is allowed, and run them all.
#
#   scripts/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh --dev
scripts/install_vulkan.sh
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/pyrefly check --python-interpreter-path .venv/bin/python
.venv/bin/python -m pytest --slow -n auto --dist loadfile --no-loadscope-reorder "$@"
