"""GPT-2 in JAX/Flax: training, evaluation and sampling of a small chat model."""
