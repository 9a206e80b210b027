"""This machine, and the libraries that run on it."""
