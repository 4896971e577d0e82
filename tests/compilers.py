"""Variables by which XLA and lavapipe compile as tests need it: quickly, and each program once."""

import atexit
import importlib.metadata
import os
import shutil
import sys
import tempfile

# Before jax is imported: the processor only, in two pieces, so that code which assumes one device shows.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
flags = ["--xla_force_host_platform_device_count=2"]
# Programs run once or twice here: what compiles them, XLA and lavapipe, is not to polish them, in subprocesses either.
# At night it is: XLA's own errors, which ours are measured by, are then those that users get.
if os.environ.get("HYPOTHESIS_PROFILE") != "night":
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    os.environ.setdefault("GALLIVM_PERF", "nopt")
    # XLA's older emitter makes a program in half the time, and in one piece in little more than half of that: each of
    # the pieces that are compiled side by side has a cost of its own, and here the workers have all processors.
    # jaxlib 0.11 has that emitter no more, and ends at a flag it lacks.
    if importlib.metadata.version("jaxlib").startswith("0.10."):
        flags += ["--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1"]
os.environ.setdefault("XLA_FLAGS", " ".join(flags))
# What one process has compiled, the other workers and the commands that tests start take from disk.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    compiled = tempfile.mkdtemp(prefix="compiled-")
    atexit.register(shutil.rmtree, compiled, ignore_errors=True)
    os.environ |= {"JAX_COMPILATION_CACHE_DIR": compiled, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    # jax writes an entry in its place. Who reads it meanwhile, or what a killed run left of it, compiles, and warns: no
    # command may fail its test for that.
    ignored = "ignore:Error reading persistent compilation cache entry"
    os.environ["PYTHONWARNINGS"] = ",".join(filter(None, (os.environ.get("PYTHONWARNINGS"), ignored)))
# Python's bytecode is kept too, whatever PYTHONDONTWRITEBYTECODE says: without it each worker takes ten seconds to
# compile hypothesis and the tests, with pytest's assertions, and each command a second.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
