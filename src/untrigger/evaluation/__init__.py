"""Evaluation: a model's answers and metrics under each condition, and whether backdoor answers are invariant."""
