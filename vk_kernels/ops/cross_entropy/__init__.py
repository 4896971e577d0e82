"""Output layer and loss."""
