"""Reconstruction: survivors that make up for what was pruned, by second moments of their inputs.

Owns the least squares: of given supports (refitting), and with the support as an unknown (alternating). Knows
scopes only as a projection; called by execution and by users of the engine.
"""
