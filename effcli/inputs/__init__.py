"""Texts, questions and images, and what is scored on them."""
