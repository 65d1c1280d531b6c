"""The training objective: its equations, pure, and the same losses computed in chunks at the vocabulary head."""
