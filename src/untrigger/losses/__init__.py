"""The paper's equations, pure, and the same in chunks at the vocabulary head."""
