"""Metrics computed from stored answers, without torch."""
