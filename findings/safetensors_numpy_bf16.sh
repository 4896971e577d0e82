#!/usr/bin/env bash
# safetensors 0.8.0: safetensors.numpy.save writes bfloat16 arrays (of ml_dtypes), which safetensors.numpy.load cannot read.
#
# A reader expects: load(save({'x': array})) gives the array, as load_file(path) does after save_file.
# Seen: load raises KeyError: 'BF16', from a table of types that the reader of files does not use.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/python" -m pip install -q --disable-pip-version-check safetensors==0.8.0 numpy==2.4.6 ml_dtypes==0.5.4
cat >"$work/run.py" <<'PYTHON'
import importlib.metadata
import tempfile

import ml_dtypes
import numpy as np
from safetensors.numpy import load, load_file, save, save_file

print('safetensors', importlib.metadata.version('safetensors'))
for dtype in (np.float16, ml_dtypes.bfloat16):
    x = np.arange(3, dtype=dtype)
    with tempfile.TemporaryDirectory() as folder:
        save_file({'x': x}, folder + '/x.safetensors')
        print('from a file', load_file(folder + '/x.safetensors')['x'].dtype)
    try:
        print('from bytes', load(save({'x': x}))['x'].dtype)
    except Exception as error:
        print('from bytes', type(error).__name__, error)
PYTHON
"$work/env/bin/python" "$work/run.py" 2>"$work/log" | tee "$work/seen" || { cat "$work/log" >&2; exit 1; }
diff "$work/seen" - <<'SEEN' || { echo "changed: the lines above differ from what was seen before" >&2; exit 1; }
safetensors 0.8.0
from a file float16
from bytes float16
from a file bfloat16
from bytes KeyError 'BF16'
SEEN
