"""The hot operations of a transformer, for JAX."""
