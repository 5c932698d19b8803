"""Telling what was measured: the documents of `--json` and report.json, tables, trees and pictures of them.

Owns their keys, schemas and looks. Prints nothing itself. Called by the command line.
"""
