"""Hostile and broken things, thousands of them: every one must end in one of few known ways (see __main__)."""
