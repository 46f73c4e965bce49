"""Training: one loop for every method, and its resumable state."""
