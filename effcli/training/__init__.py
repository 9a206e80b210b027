"""Training: the loop that every training pass runs on, and what it needs to go on after a crash."""
