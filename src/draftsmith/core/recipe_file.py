"""Recipes from YAML and flags, and back; what is wrong with one is a line that names the key."""

import difflib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from draftsmith.core.errors import RecipeError
from draftsmith.core.files import JsonObject
from draftsmith.core.recipe import Recipe


def _submodel(annotation: Any) -> type[BaseModel] | None:
    """The model class inside Optional[...] or tuple[..., ...]."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return annotation if issubclass(annotation, BaseModel) else None
    return next((found for arg in typing.get_args(annotation) if (found := _submodel(arg))), None)


def _known_keys(path: tuple[str | int, ...]) -> list[str]:
    """Keys that a recipe has at this place; none where there is no such place."""
    model: type[BaseModel] | None = Recipe
    for part in path:
        if isinstance(part, str) and model is not None:
            field = model.model_fields.get(part)
            model = _submodel(field.annotation) if field else None
    return list(model.model_fields) if model is not None else []


def one_line(error: ValidationError) -> str:
    """The first problem of a pydantic error as one line that names the key and what is allowed."""
    problem = error.errors()[0]
    *parents, last = problem["loc"] or ("",)
    key = ".".join(str(part) for part in problem["loc"])
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if problem["type"] == "extra_forbidden":
        known = _known_keys(tuple(parents))
        near = difflib.get_close_matches(str(last), known, n=1, cutoff=0.0)
        return f"{key}: unknown key; did you mean {near[0]!r}?{more}" if near else f"{key}: unknown key{more}"
    if problem["type"] == "missing":
        return f"{key}: missing; give it a value{more}"
    if problem["type"] == "value_error":
        text = str(problem["ctx"]["error"])  # some name their key themselves
        return f"{text if text.startswith(key) else f'{key}: {text}'}{more}"
    return f"{key}: {problem['input']!r} given; {problem['msg'][0].lower()}{problem['msg'][1:]}{more}"


def parse_recipe(values: Any, origin: str) -> Recipe:
    """Validate plain values; raises `RecipeError` of one line that starts with `origin`."""
    if not isinstance(values, dict):
        raise RecipeError(f"{origin}: a recipe is a mapping of keys to values, not {type(values).__name__}")
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise RecipeError(f"{origin}: {one_line(error)}") from None


def _merged(values: JsonObject, over: Mapping[str, Any]) -> JsonObject:
    """`values` with the leaves of `over` in their place."""
    out = dict(values)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(out.get(key), dict)
        out[key] = _merged(out[key], value) if both else value
    return out


def load_recipe(path: Path, flags: Mapping[str, Any] | None = None) -> Recipe:
    """Read a YAML recipe, with flags in place of what it says.

    Paths in it are relative to the working directory, as on the command line.
    """
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot read the recipe: {getattr(error, 'strerror', None) or error}") from None
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        raise RecipeError(f"{path}{where}: not YAML: {getattr(error, 'problem', error)}") from None
    recipe = parse_recipe(values, str(path))
    return parse_recipe(_merged(values, flags), "flags") if flags else recipe


def dump_recipe(recipe: Recipe) -> str:
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, width=120)
