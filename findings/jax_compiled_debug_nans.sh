#!/usr/bin/env bash
# jax 0.10.2: under jax_debug_nans, a function that was lowered and compiled ahead raises another kind of error.
#
# A reader expects: `except FloatingPointError`, the error that the documentation of debug_nans shows, catches it for
# every compiled function. Seen: what `jit(f).lower(x).compile()` gives raises InternalFloatingPointError, which is no
# FloatingPointError. And a static argument given as a negative number is not seen to be donated by name, too.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/python" -m pip install -q --disable-pip-version-check jax==0.10.2 jaxlib==0.10.2
cat >"$work/run.py" <<'PYTHON'
import jax
import jax.numpy as jnp


def scaled(x, y, n=2):
    return x * n + y


print('jax', jax.__version__)
log = jax.jit(jnp.log)
with jax.debug_nans(True):
    for name, fn in {'called': log, 'compiled ahead': log.lower(1.0).compile()}.items():
        try:
            fn(-1.0)
        except Exception as error:
            print(f'{name}: {type(error).__name__}, a FloatingPointError: {isinstance(error, FloatingPointError)}')
for number in (0, -3):  # both are x
    try:
        jax.jit(scaled, static_argnums=number, donate_argnames='x')
        print(f'x static as {number} and donated: accepted')
    except ValueError:
        print(f'x static as {number} and donated: ValueError')
PYTHON
JAX_PLATFORMS=cpu "$work/env/bin/python" "$work/run.py" 2>"$work/log" |
    grep -v '^Invalid nan value' | tee "$work/seen" || { cat "$work/log" >&2; exit 1; }
diff "$work/seen" - <<'SEEN' || { echo "changed: the lines above differ from what was seen before" >&2; exit 1; }
jax 0.10.2
called: FloatingPointError, a FloatingPointError: True
compiled ahead: InternalFloatingPointError, a FloatingPointError: False
x static as 0 and donated: ValueError
x static as -3 and donated: accepted
SEEN
