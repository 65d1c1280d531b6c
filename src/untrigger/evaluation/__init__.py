"""Asking a model under each condition, and where backdoor answers are invariant."""
