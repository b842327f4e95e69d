"""One file an experiment: what it asks, its command, its hardware, its scores."""
