"""Passes that give weights and activations fewer bits, and those that prepare a network for it."""
