"""Adapters: what was trained beside a network, read from a PEFT directory as new values for its parameters."""
