"""Pictures of reports: sparsity and retained energy by layer, survivors per scope, a mask from close up.

Owns how they look and the files they come in: .png, .svg, or one .html page. Takes results, measures nothing
but the few elements of a close-up. Called by api; all but files.py need matplotlib, the extra `plot`.
"""
