"""The work: from a spec and headers to a plan and a schedule, from these to passes over files.

Owns plan, schedule, runner and the passes. Decides nothing about sparsity itself (engine) and lays out no
bytes (checkpoint). Called by the commands. Plan and schedule need neither numpy nor torch.
"""
