"""Perturbed looks at an image."""
