"""The record of a run, and how it is shown: terminal, HTML, model card."""
