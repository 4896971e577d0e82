#!/usr/bin/env bash
# jax 0.10.2: an entry of the persistent compilation cache that was cut short is kept for ever.
#
# A reader expects: an entry is there whole or not at all, or one that cannot be read is written anew. Seen: jax writes it
# in its place, and never again what is there already. So where one process ran out of disk (here: reached its limit of
# a file's size) or was killed as it wrote, each process from then on compiles anew and warns, until somebody finds and
# deletes the file; and a process that reads while another one writes warns too.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/python" -m pip install -q --disable-pip-version-check jax==0.10.2 jaxlib==0.10.2
cat >"$work/run.py" <<'PYTHON'
import os
import resource
import sys
import warnings

import jax
import numpy as np

if len(sys.argv) > 1:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
with warnings.catch_warnings(record=True) as caught:
    jax.jit(lambda x: np.float32(2) * x + 1)(np.ones(4, np.float32)).block_until_ready()
[entry] = os.listdir(os.environ['JAX_COMPILATION_CACHE_DIR'])
size = os.path.getsize(os.path.join(os.environ['JAX_COMPILATION_CACHE_DIR'], entry))
said = [str(each.message).partition(' for ')[0] for each in caught]
print(f"an entry of {'1,000' if size == 1000 else 'more than 1,000'} bytes; {said or 'no warning'}")
PYTHON
export JAX_PLATFORMS=cpu JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0
run() { JAX_COMPILATION_CACHE_DIR="$work/$1" "$work/env/bin/python" "$work/run.py" "${@:2}" 2>>"$work/log"; }
{
    "$work/env/bin/python" -c "import jax; print('jax', jax.__version__)"
    for _ in 1 2; do run whole; done
    run cut 1000
    for _ in 1 2; do run cut; done
} | tee "$work/seen" || { cat "$work/log" >&2; exit 1; }
diff "$work/seen" - <<'SEEN' || { echo "changed: the lines above differ from what was seen before" >&2; exit 1; }
jax 0.10.2
an entry of more than 1,000 bytes; no warning
an entry of more than 1,000 bytes; no warning
an entry of 1,000 bytes; ['Error writing persistent compilation cache entry']
an entry of 1,000 bytes; ['Error reading persistent compilation cache entry']
an entry of 1,000 bytes; ['Error reading persistent compilation cache entry']
SEEN
