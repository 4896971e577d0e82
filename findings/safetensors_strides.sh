#!/usr/bin/env bash
# safetensors 0.8.0: safetensors.numpy writes a view that is not contiguous in the order of its memory.
#
# A reader expects: load(save({'x': array})) gives the array, or an error asks for a contiguous one (torch's door does).
# Seen: the shape is the view's and the values are others: those that follow each other in memory.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/python" -m pip install -q --disable-pip-version-check safetensors==0.8.0 numpy==2.4.6
cat >"$work/run.py" <<'PYTHON'
import importlib.metadata

import numpy as np
from safetensors.numpy import load, save

print('safetensors', importlib.metadata.version('safetensors'))
x = np.arange(6, dtype=np.float32).reshape(2, 3)
for name, view in (('transposed', x.T), ('every second column', x[:, ::2]), ('contiguous', np.ascontiguousarray(x.T))):
    back = load(save({'x': view}))['x']
    print(f'{name}: saved {view.tolist()}, loaded {back.tolist()}')
PYTHON
"$work/env/bin/python" "$work/run.py" 2>"$work/log" | tee "$work/seen" || { cat "$work/log" >&2; exit 1; }
diff "$work/seen" - <<'SEEN' || { echo "changed: the lines above differ from what was seen before" >&2; exit 1; }
safetensors 0.8.0
transposed: saved [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]], loaded [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]]
every second column: saved [[0.0, 2.0], [3.0, 5.0]], loaded [[0.0, 1.0], [2.0, 3.0]]
contiguous: saved [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]], loaded [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]
SEEN
