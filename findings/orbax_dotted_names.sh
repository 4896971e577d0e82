#!/usr/bin/env bash
# orbax-checkpoint 0.12.8: a leaf named 'a.b' and a leaf 'b' under 'a' are stored at one place.
#
# A reader expects: what was saved comes back, or an error says that two names collide.
# Seen: both come back with the values of one of them, without a word. With 'a/b' for 'a.b' both come back right.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/python" -m pip install -q --disable-pip-version-check orbax-checkpoint==0.12.8 jax==0.10.2
cat >"$work/run.py" <<'PYTHON'
import tempfile

import jax
import numpy as np
import orbax.checkpoint as ocp

print('orbax-checkpoint', ocp.__version__)
checkpointer = ocp.StandardCheckpointer()
for name in ('a.b', 'a/b'):
    saved = {name: np.full(2, 1.0), 'a': {'b': np.full(2, 7.0)}}
    with tempfile.TemporaryDirectory() as folder:
        checkpointer.save(folder + '/state', saved)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(folder + '/state')
    print('saved   ', jax.tree.map(np.ndarray.tolist, saved))
    print('restored', jax.tree.map(lambda x: np.asarray(x).tolist(), restored))
PYTHON
"$work/env/bin/python" "$work/run.py" 2>"$work/log" | tee "$work/seen" || { cat "$work/log" >&2; exit 1; }
diff "$work/seen" - <<'SEEN' || { echo "changed: the lines above differ from what was seen before" >&2; exit 1; }
orbax-checkpoint 0.12.8
saved    {'a': {'b': [7.0, 7.0]}, 'a.b': [1.0, 1.0]}
restored {'a': {'b': [7.0, 7.0]}, 'a.b': [7.0, 7.0]}
saved    {'a': {'b': [7.0, 7.0]}, 'a/b': [1.0, 1.0]}
restored {'a': {'b': [7.0, 7.0]}, 'a/b': [1.0, 1.0]}
SEEN
