"""Telling what was measured: the documents of `--json` and report.json, and tables for the terminal.

Owns their keys, schemas and looks, and the measuring of a checkpoint (`inspect`). Prints nothing
itself. Called by the command line.
"""
