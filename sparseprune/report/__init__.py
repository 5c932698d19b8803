"""Results for people: makes the classes of results/, and tables, trees, CSV, Markdown and pictures of them.

Owns how they look and the JSON Schema files. Prints nothing itself. Called by api/ and cli/.
"""
