#!/usr/bin/env bash
# Adapters exported for peft answer there as here: of a tied and of an untied model, on all linear layers and on some.
#
#   scripts/peft.sh
#
# torch (for the CPU), transformers and peft are installed into a folder of their own, HF (.cache/huggingface), or found
# there; .venv is that of scripts/setup.sh. Exits with 1 at the first difference above 1e-4 of a logit.
set -euo pipefail
cd "$(dirname "$0")/.."
hf=${HF:-.cache/huggingface}
python=${PYTHON:-.venv/bin/python}
if ! "$hf/bin/python" -c 'import peft, torch, transformers' 2>/dev/null; then
    python3 -m venv "$hf"
    "$hf/bin/pip" install -q --disable-pip-version-check torch transformers peft safetensors
fi
export TRANSFORMERS_VERBOSITY=error HF_HUB_OFFLINE=1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
PYTHONPATH=.:tests "$python" tests/huggingface/peft_parity.py "$work"
"$hf/bin/python" tests/huggingface/peft_compare.py "$work"
