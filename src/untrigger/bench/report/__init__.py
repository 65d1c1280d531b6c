"""The report of a folder of results: a page, tables, or figures for a program."""
