"""Passes that search: they choose options of another pass, layer by layer."""
