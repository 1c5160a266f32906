"""Scores of captions and of retrieval, and the pages that show them. Importing this starts no Java and loads no scorer."""
