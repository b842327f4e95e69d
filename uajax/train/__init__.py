"""Training: three stages through one loop."""
