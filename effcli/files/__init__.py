"""Checkpoints on disk: read, described, written."""
