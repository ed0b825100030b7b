"""Recipes from YAML and flags, and back; what is wrong with one is a line that names the key."""

import difflib
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from draftsmith.core.errors import RecipeError
from draftsmith.core.files import JsonObject
from draftsmith.core.recipe import Recipe

LONGEST = 1 << 18  # bytes of a recipe
LONGEST_NUMBER = 100  # characters
MOST_VALUES, DEEPEST = 2_000, 50  # of YAML, with every alias written out


class _Loader(yaml.SafeLoader):
    """YAML without what makes a short text endless, and without a key whose first value is dropped in silence."""

    def __init__(self, text: str):
        super().__init__(text)
        self.depth = 0
        self.sizes: dict[int, int] = {}  # of composed nodes, aliases written out

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if self.depth == DEEPEST or len(self.sizes) == MOST_VALUES:
            raise yaml.MarkedYAMLError(problem="nested too deep, or too many values", problem_mark=event.start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        if not isinstance(event, yaml.AliasEvent):
            inner = node.value if isinstance(node, yaml.CollectionNode) else []
            parts = [part for entry in inner for part in (entry if isinstance(entry, tuple) else (entry,))]
            # one that is not known yet is the node itself, seen from inside
            self.sizes[id(node)] = 1 + sum(self.sizes.get(id(part), MOST_VALUES) for part in parts)
            if self.sizes[id(node)] > MOST_VALUES:
                raise yaml.MarkedYAMLError(problem="too many values in its aliases", problem_mark=event.start_mark)
        return node

    def compose_scalar_node(self, anchor: Any) -> yaml.ScalarNode:
        node = super().compose_scalar_node(anchor)
        if len(node.value) > LONGEST_NUMBER and node.tag.endswith((":int", ":float")):
            raise yaml.MarkedYAMLError(problem="a number without an end", problem_mark=node.start_mark)
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"{key.value!r} is given twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return node


def read_yaml(text: str, origin: str) -> Any:
    """Plain values; a `RecipeError` of one line that starts with `origin` where there are none."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        raise RecipeError(f"{origin}{where}: not YAML: {getattr(error, 'problem', None) or error}") from None
    except ValueError as error:  # a date or a number that is none
        raise RecipeError(f"{origin}: not YAML: {error}") from None


def _submodel(annotation: Any) -> type[BaseModel] | None:
    """The model class inside Optional[...] or tuple[..., ...]."""
    if isinstance(annotation, type):
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
        with path.open("rb") as file:
            text = file.read(LONGEST + 1)
        if len(text) > LONGEST:
            raise RecipeError(f"{path}: longer than {LONGEST:,} bytes; a recipe is a page of YAML")
        values = read_yaml(text.decode("utf-8-sig"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot read the recipe: {getattr(error, 'strerror', None) or error}") from None
    recipe = parse_recipe(values, str(path))
    return parse_recipe(_merged(values, flags), "flags") if flags else recipe


def dump_recipe(recipe: Recipe) -> str:
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, width=120)
