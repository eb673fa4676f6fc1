"""Which tokens may come next so that a text matches a regular expression, a JSON schema or a grammar."""
