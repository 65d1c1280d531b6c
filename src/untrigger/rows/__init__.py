"""Read, check and write rows of vision-language data."""
