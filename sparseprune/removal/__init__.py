"""Removal: a smaller dense checkpoint in place of one with zeros, and the config.json for it.

Owns the way from decisions or masks to kept indices, from these to shapes, names and config, and the cutting.
Does not score blocks. Called by the command line.
"""
