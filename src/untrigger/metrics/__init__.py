"""Figures from stored answers, without torch."""
