"""GPT-2 in JAX/Flax: training, evaluation and sampling of a small chat model."""

import time

BEGAN = time.perf_counter()  # as good as the start of a process of this package: before the imports, which take seconds
