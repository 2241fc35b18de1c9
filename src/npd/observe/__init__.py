"""Metrics, events, progress."""
