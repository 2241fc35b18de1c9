"""Told by a run while it works: spans, progress, figures for trackers, tables on a terminal."""
