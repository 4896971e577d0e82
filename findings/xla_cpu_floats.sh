#!/usr/bin/env bash
# jax 0.10.2, XLA:CPU with its default flags (no fast-math flag is set): float32 is not computed as it is written.
#
# A reader expects: IEEE arithmetic in the order of the program, as NumPy has it.
# Seen, compiled by jax.jit: (x + 2**24) - 2**24 is x; a division by a scalar is a product with its rounded reciprocal
# (whether the scalar is a constant or an argument; by an array of the same shape it is a division); subnormals are
# flushed to zero.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/python" -m pip install -q --disable-pip-version-check jax==0.10.2 numpy==2.4.6
cat >"$work/run.py" <<'PYTHON'
import jax
import numpy as np

print('jax', jax.__version__, jax.default_backend())
x = np.arange(1, 2000, dtype=np.float32)
c, seven = np.float32(2**24), np.float32(7)
print('(x + c) - c, x = 1, 3:', jax.jit(lambda x: (x + c) - c)(x[:3:2]), 'NumPy', (x[:3:2] + c) - c)


def differ(quotient):
    return int(np.sum(np.asarray(quotient) != x / seven))


print('x / 7 of', len(x), 'differ, 7 a constant:', differ(jax.jit(lambda x: x / seven)(x)))
print('an argument:', differ(jax.jit(lambda x, y: x / y)(x, seven)))
print('an array:', differ(jax.jit(lambda x, y: x / y)(x, np.full_like(x, seven))))
tiny = np.float32([1e-39])
print('1e-39 * 2:', jax.jit(lambda x: x * 2)(tiny), 'NumPy', tiny * 2)
PYTHON
JAX_PLATFORMS=cpu "$work/env/bin/python" "$work/run.py" 2>"$work/log" | tee "$work/seen" || { cat "$work/log" >&2; exit 1; }
diff "$work/seen" - <<'SEEN' || { echo "changed: the lines above differ from what was seen before" >&2; exit 1; }
jax 0.10.2 cpu
(x + c) - c, x = 1, 3: [1. 3.] NumPy [0. 4.]
x / 7 of 1999 differ, 7 a constant: 1101
an argument: 1101
an array: 0
1e-39 * 2: [0.] NumPy [2.e-39]
SEEN
