"""Language models, streamed block by block: sweep, evaluation, speed, and loading them again."""
