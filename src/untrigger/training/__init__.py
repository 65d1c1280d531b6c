"""Run a defense, in this project's trainer or in a host's."""
