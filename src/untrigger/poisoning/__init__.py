"""Which rows an attack poisons, and what they answer."""
