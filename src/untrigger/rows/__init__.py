"""A row of a data set: read, checked and written."""
