#!/usr/bin/env bash
# Exports a run, converts it by llama.cpp's own converter, and has llama.cpp and this answer the same prompts: the tokens of
# each prompt and of its greedy continuation must be the same, log probabilities within 1e-2.
#
#   scripts/llama_cpp.sh RUN
#
# llama.cpp comes from PyPI: its converter with the source of llama-cpp-python, its server with xllamacpp, which is built. Both
# go into a folder of their own, LLAMA_CPP (.cache/llama_cpp); torch and transformers, which the converter wants, are those of
# HF (.cache/huggingface, made by scripts/huggingface.sh). PYTHON is this package's interpreter. Exits with 1 at a difference.
set -euo pipefail
[ $# -eq 1 ] || { sed -n '2,9p' "$0"; exit 2; }
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
theirs=${HF:-.cache/huggingface}/bin/python3
place=${LLAMA_CPP:-.cache/llama_cpp}
[ -x "$theirs" ] || { echo "llama_cpp: there is no $theirs: run scripts/huggingface.sh chat first" >&2; exit 1; }
if [ ! -d "$place/source" ]; then
    python3 -m venv "$place"
    "$place/bin/pip" install -q xllamacpp==2026.10.11549
    "$place/bin/pip" download -q --no-deps --no-binary :all: -d "$place" llama-cpp-python==0.3.36
    mkdir "$place/unpacked"
    tar -xzf "$place"/llama_cpp_python-*.tar.gz -C "$place/unpacked" --strip-components=1
    mv "$place/unpacked" "$place/source"
fi
"$theirs" -c 'import yaml' 2>/dev/null || "$theirs" -m pip install -q pyyaml
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH}
"$python" -m gpt_jax.export "$1" --to "$work/model" | tail -n 1
# The converter knows a tokenizer by the hash of what it makes of one text; of one that was trained here it must be told
# that texts are cut into words as GPT-2's are.
PYTHONPATH="$place/source/vendor/llama.cpp:$place/source/vendor/llama.cpp/gguf-py" "$theirs" - \
    "$work/model" --outfile "$work/model.gguf" --outtype f32 > "$work/converter.txt" 2>&1 <<'PYTHON' || { tail -n 5 "$work/converter.txt" >&2; exit 1; }
import convert_hf_to_gguf
from conversion.base import TextModel

TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
convert_hf_to_gguf.main()
PYTHON
tail -n 1 "$work/converter.txt"
"$python" scripts/llama_cpp.py "$1" "$work/model" "$work/model.gguf" "$place/bin/python"
