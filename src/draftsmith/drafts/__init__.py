"""Drafting methods; another one is a folder and a line here."""

from typing import Any

from draftsmith.drafts import eagle3
from draftsmith.drafts.method import Method

METHODS: dict[str, Method[Any, Any]] = {method.name: method for method in (eagle3.METHOD,)}
"""By their names in recipes."""
