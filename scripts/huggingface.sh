#!/usr/bin/env bash
# Parity with transformers, both ways: logits, greedy texts and tokens, on XLA and on a Vulkan device.
#
#   scripts/huggingface.sh [chat] [sharded] [92m] [124m]    these sizes of GPT-2 alone; without, all four
#   scripts/huggingface.sh --run RUN                   exports a run: its logits and greedy answers here and there
#   scripts/huggingface.sh --models                    makes the small models of the tests anew, tests/huggingface/models
#
# torch (for the CPU) and transformers are installed into a folder of their own, HF (.cache/huggingface), or found there:
# HF=/usr takes those of /usr/bin/python3. PYTHON is the other interpreter, .venv/bin/python as scripts/setup.sh made it.
# VK_KERNELS_DEVICE=cpu takes a software Vulkan driver. Exits with 1 at the first difference.
set -euo pipefail
cd "$(dirname "$0")/.."
hf=${HF:-.cache/huggingface}
python=${PYTHON:-.venv/bin/python}
if [ ! -x "$hf/bin/python3" ]; then
    python3 -m venv "$hf"
    "$hf/bin/pip" install -q --disable-pip-version-check torch transformers safetensors tokenizers jinja2 gguf
fi
theirs=$hf/bin/python3
"$theirs" -c 'import torch, transformers; print("transformers", transformers.__version__, "torch", torch.__version__)'
export TRANSFORMERS_VERBOSITY=error HF_HUB_DISABLE_PROGRESS_BARS=1 HF_HUB_OFFLINE=1
if [ "${1:-}" = --models ]; then
    exec "$theirs" tests/huggingface/make_models.py
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
ours() { PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH} "$python" tests/huggingface/parity.py "$@"; }
if [ "${1:-}" = --run ]; then
    ours export-run "$work" "${2:?a run, as gpt_jax.export takes it}"
    "$theirs" tests/huggingface/parity.py read-run "$work"
    exit
fi
"$theirs" tests/huggingface/parity.py models "$work" "$@"
ours import "$work" "$@"
"$theirs" tests/huggingface/parity.py export "$work" "$@"
