#!/usr/bin/env bash
# What only a GPU can tell: the kernels' contract tests with every variant it offers, the comparison with float64 at
# real shapes, the benchmark, and whether the train step got slower.
#
#   scripts/gpu_check.sh [python]     the interpreter; default .venv/bin/python
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-.venv/bin/python}
export VK_KERNELS_DEVICE=${VK_KERNELS_DEVICE:-gpu} PYTHONPATH=.
JAX_PLATFORMS=cpu "$python" -m vk_kernels.tools.doctor --no-test
JAX_PLATFORMS=cpu "$python" -m pytest -m vulkan tests/runtime tests/ops tests/tools tests/bridge/test_custom_call.py tests/training/test_ops_in_training.py
JAX_PLATFORMS=cpu "$python" -m vk_kernels.tools.check_ops --sizes tiny,megabyte,chat
"$python" benchmarks/ops.py
"$python" benchmarks/gate.py
