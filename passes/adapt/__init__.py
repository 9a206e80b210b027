"""Passes that take in what was trained beside a network."""
