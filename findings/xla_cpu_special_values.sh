#!/usr/bin/env bash
# jax 0.10.2, XLA:CPU with its default flags: literals, -0 and subnormal ones above all, are not what the program has.
#
# A reader expects: IEEE 754, and the same result for a literal as for an argument.
# Seen, compiled by jax.jit: in a bfloat16 program the literal 0 becomes 1.5e-39 where that comes first; what is computed
# of literals alone has other values than with an argument (count of leading zeros, asinh, sign, reduce_precision); x + 0
# is x for -0 too, and x / 3.4e38 is 0 for x = 3.4e38. Before XLA, JAX takes a gather with fill_value=-0. for one with 0.
# that it has traced.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/python" -m pip install -q --disable-pip-version-check jax==0.10.2 numpy==2.4.6 ml_dtypes==0.6.0
cat >"$work/run.py" <<'PYTHON'
import jax
import ml_dtypes
import numpy as np
from jax import lax

print('jax', jax.__version__, jax.default_backend())
f32, bf16 = np.float32, ml_dtypes.bfloat16
nan, largest = f32(np.nan), f32(3.4028235e38)
y, tiny = np.array([-1, 1], bf16), bf16(1.5e-39)
print('rem(tiny, y), rem(0, y):', [z.tolist() for z in jax.jit(lambda y: (lax.rem(tiny, y), lax.rem(bf16(0), y)))(y)])
for name, fn, c in (
    ('clz', lax.clz, np.int8(-1)),
    ('asinh', lax.asinh, f32(-0.0)),
    ('sign', lax.sign, f32(-0.0)),
    ('reduce_precision', lambda x: lax.reduce_precision(x, 8, 0), nan),
):
    print(f'{name}({c}), a literal:', jax.jit(lambda fn=fn, c=c: fn(c))(), 'an argument:', jax.jit(fn)(c))
print('-0 + 0, a literal:', jax.jit(lambda x: x + f32(0))(f32(-0.0)), 'an argument:', jax.jit(lax.add)(f32(-0.0), f32(0)))
print('3.4e38 / largest, a literal:', jax.jit(lambda x: x / largest)(f32(3.4e38)), 'NumPy', f32(3.4e38) / largest)


def filled(x, value):
    return x.at[np.array([99])].get(mode='fill', fill_value=value)


print('filled with 0, with -0:', *jax.jit(lambda x: (filled(x, 0.0), filled(x, -0.0)))(np.arange(3, dtype=f32)))
PYTHON
JAX_PLATFORMS=cpu "$work/env/bin/python" "$work/run.py" 2>"$work/log" | tee "$work/seen" || { cat "$work/log" >&2; exit 1; }
diff "$work/seen" - <<'SEEN' || { echo "changed: the lines above differ from what was seen before" >&2; exit 1; }
jax 0.10.2 cpu
rem(tiny, y), rem(0, y): [[1.4693679385278594e-39, 1.4693679385278594e-39], [1.4693679385278594e-39, 1.4693679385278594e-39]]
clz(-1), a literal: -56 an argument: 0
asinh(-0.0), a literal: 0.0 an argument: -0.0
sign(-0.0), a literal: 0.0 an argument: -0.0
reduce_precision(nan), a literal: inf an argument: nan
-0 + 0, a literal: -0.0 an argument: 0.0
3.4e38 / largest, a literal: 0.0 NumPy 0.99917024
filled with 0, with -0: [0.] [0.]
SEEN
