"""The model, in Flax (linen)."""
