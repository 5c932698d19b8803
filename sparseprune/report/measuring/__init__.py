"""Measuring checkpoints without writing any: what stands in one, what differs between two.

Owns which slabs are read by whom and how counts add up. Gives facts, plain data; how they are told is the
business of the modules around this room. Needs no torch.
"""
