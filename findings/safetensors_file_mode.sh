#!/usr/bin/env bash
# safetensors 0.8.0: a file of save_file can be read by its owner alone, whatever the umask says.
#
# A reader expects: the mode that open(path, 'wb') gives, 0644 under the umask 022, as other writers of weights do.
# Seen: 0600, that of the temporary file which takes the name at the end; also where a file of mode 0644 stood before.
# So a model copied to a shared folder or a web server's with its modes cannot be read there, while its config.json can.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/python" -m pip install -q --disable-pip-version-check safetensors==0.8.0 numpy==2.4.6
cat >"$work/run.py" <<'PYTHON'
import importlib.metadata
import os
import stat
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

print('safetensors', importlib.metadata.version('safetensors'))
os.umask(0o022)
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder, 'model.safetensors')
    path.write_bytes(b'')
    print('made by Python', oct(stat.S_IMODE(path.stat().st_mode)))
    save_file({'x': np.zeros(3, np.float32)}, path)
    print('after save_file', oct(stat.S_IMODE(path.stat().st_mode)))
PYTHON
"$work/env/bin/python" "$work/run.py" 2>"$work/log" | tee "$work/seen" || { cat "$work/log" >&2; exit 1; }
diff "$work/seen" - <<'SEEN' || { echo "changed: the lines above differ from what was seen before" >&2; exit 1; }
safetensors 0.8.0
made by Python 0o644
after save_file 0o600
SEEN
