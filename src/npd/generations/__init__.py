"""Generations: what they are, who makes them, and how. Here rollout, scoring and selection meet."""
