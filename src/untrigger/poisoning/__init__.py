"""Poisoning: the choice of rows, the goals of attackers, and the manifest."""
