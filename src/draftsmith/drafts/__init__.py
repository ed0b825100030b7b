"""Drafting methods; another one is a folder and a line here."""

from draftsmith.drafts import eagle3
from draftsmith.drafts.method import Method

METHODS: dict[str, Method] = {method.name: method for method in (eagle3.METHOD,)}
"""By their names in recipes."""
