"""The training loop, its step, and what a run needs before and after it."""
