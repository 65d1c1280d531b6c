"""Load vision-language models, collate rows for them, score rows and generate answers."""
