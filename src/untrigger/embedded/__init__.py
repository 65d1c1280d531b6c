"""The bundled models: weights and their cards only."""
