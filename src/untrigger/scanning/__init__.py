"""Which rows of a data set are suspected, and why."""
