"""Removal: a smaller dense checkpoint in place of one with zeros, and the config.json that it needs.

Owns the way from masks to whole slices, from slices to the new shapes, names and config, and the cutting.
What masks are is decided elsewhere. Called by the command line.
"""
