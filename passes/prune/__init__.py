"""Passes that remove weights: one by one, or whole channels with everything that goes with them."""
