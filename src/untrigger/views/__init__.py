"""Perturb image patches: augmented views of an input."""
