"""Compiled loops for the CPU over bit patterns: numpy arrays in, numpy arrays out, no torch.

Each loop does what the torch engine does, bit for bit, where a shape and a dtype allow it (see
formats.py for the dtypes); tests hold the two equal. The loops release the interpreter's lock and
are compiled by numba on first use, then kept on disk. Called by execution.
"""
