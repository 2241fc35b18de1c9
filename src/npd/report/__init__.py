"""Reads a run directory, and nothing else: pages about runs, comparisons, a view for a terminal, traces."""
