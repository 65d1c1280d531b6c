"""The report of a folder of results: an HTML page, Markdown tables, or JSON figures."""
