#!/usr/bin/env bash
# Parity with transformers, both ways: logits, greedy texts and tokens, on XLA and on a Vulkan device.
#
#   scripts/huggingface.sh [chat] [sharded] [124m]     these sizes of GPT-2 alone; without, all three
#
# torch (for the CPU) and transformers are installed into a folder of their own, HF (.cache/huggingface), or found there;
# .venv is that of scripts/setup.sh. VK_KERNELS_DEVICE=cpu takes a software Vulkan driver. Exits with 1 at the first
# difference. `--models` makes the small models of the tests anew instead, tests/huggingface/models.
set -euo pipefail
cd "$(dirname "$0")/.."
hf=${HF:-.cache/huggingface}
python=${PYTHON:-.venv/bin/python}
if [ ! -x "$hf/bin/python" ]; then
    python3 -m venv "$hf"
    "$hf/bin/pip" install -q --disable-pip-version-check torch transformers safetensors tokenizers jinja2 gguf
fi
"$hf/bin/python" -c 'import torch, transformers; print("transformers", transformers.__version__, "torch", torch.__version__)'
export TRANSFORMERS_VERBOSITY=error HF_HUB_DISABLE_PROGRESS_BARS=1 HF_HUB_OFFLINE=1
if [ "${1:-}" = --models ]; then
    exec "$hf/bin/python" tests/huggingface/make_models.py
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$hf/bin/python" tests/huggingface/parity.py models "$work" "$@"
PYTHONPATH=. "$python" tests/huggingface/parity.py import "$work" "$@"
"$hf/bin/python" tests/huggingface/parity.py export "$work" "$@"
