"""Flags from the fields of pydantic models: argparse reads them, pydantic alone says what is allowed."""

import argparse
import difflib
import re
import types
import typing
from collections.abc import Iterator
from typing import Any, Literal, NoReturn

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from draftsmith.core.errors import RecipeError
from draftsmith.core.files import JsonObject
from draftsmith.core.recipe_file import read_yaml

NOTHING = "none"  # as a value: the key without one


class _Parser(argparse.ArgumentParser):
    """Tells what is wrong as a `RecipeError` instead of leaving the process."""

    def error(self, message: str) -> NoReturn:
        if "are required: " in message:
            raise RecipeError(f"usage: {self.prog} {message.split(': ')[-1]} [flags]")
        hint = f"{self.prog} --help-all lists them"
        if found := re.search(r"unrecognized arguments: (--[\w.-]+)", message):
            known = [flag for action in self._actions for flag in action.option_strings]
            hint = f"did you mean {difflib.get_close_matches(found[1], known, n=1, cutoff=0.0)[0]}?"
        raise RecipeError(f"flags: {message}; {hint}")


def _parts(annotation: Any) -> list[Any]:
    """The types inside Optional, unions, tuples and Annotated, itself if there are none."""
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType, tuple, typing.Annotated):
        inside = typing.get_args(annotation)[: 1 if origin is typing.Annotated else None]
        return [part for arg in inside if arg is not Ellipsis for part in _parts(arg)]
    return [annotation]


def _is_tuple(annotation: Any) -> bool:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, typing.Annotated):
        return any(_is_tuple(arg) for arg in typing.get_args(annotation))
    return typing.get_origin(annotation) is tuple


def _leaves(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every key that takes a value, as (`train.epochs`, its field)."""
    for key, field in model.model_fields.items():
        inner = next((p for p in _parts(field.annotation) if isinstance(p, type) and issubclass(p, BaseModel)), None)
        if inner is None or _is_tuple(field.annotation):
            yield prefix + key, field
        else:
            yield from _leaves(inner, f"{prefix}{key}.")


def _value(text: str, field: FieldInfo) -> Any:
    parts = _parts(field.annotation)
    if text == NOTHING and type(None) in parts:
        return None
    mapping = any(typing.get_origin(p) is dict or (isinstance(p, type) and issubclass(p, BaseModel)) for p in parts)
    return read_yaml(text, "flags") if mapping and text.lstrip().startswith("{") else text


def _add(parser: argparse.ArgumentParser, key: str, field: FieldInfo) -> None:
    about = field.description or ""
    if field.default not in (None, PydanticUndefined, ()):
        default = field.default
        about += f" [{' '.join(map(str, default)) if isinstance(default, tuple) else default}]"
    options: JsonObject = {"dest": key, "default": argparse.SUPPRESS, "help": about.replace("%", "%%")}
    if field.annotation is bool:
        options["action"] = argparse.BooleanOptionalAction
    else:
        parts = [p for p in _parts(field.annotation) if p is not type(None)]
        choices = [str(c) for p in parts if typing.get_origin(p) is Literal for c in typing.get_args(p)]
        name = "{" + ",".join(choices) + "}" if choices else getattr(parts[0], "__name__", "value").lower()
        options |= {"metavar": name}
        options |= {"nargs": "+"} if _is_tuple(field.annotation) else {}
    short = field.json_schema_extra.get("flag") if isinstance(field.json_schema_extra, dict) else None
    parser.add_argument(f"--{key.replace('_', '-')}", *([str(short)] if short else []), **options)


def read(
    own: type[BaseModel], others: type[BaseModel] | None, prog: str, about: str, arguments: list[str]
) -> tuple[JsonObject, JsonObject]:
    """(values of the command's own fields, nested values of the other model's), as given, not validated yet. The field
    without a default stands without a flag."""
    positional = next(key for key, field in own.model_fields.items() if field.is_required())
    parser = _Parser(prog=prog, description=about, allow_abbrev=False)
    parser.add_argument(positional, metavar=positional.upper(), help=own.model_fields[positional].description)
    fields = {key: field for key, field in own.model_fields.items() if key not in (positional, "stage")}
    beside = dict(_leaves(others)) if others else {}
    for key, field in (fields | beside).items():
        _add(parser, key, field)
    plain = [re.sub(r"^--[\w.-]+", lambda flag: flag[0].replace("_", "-"), argument) for argument in arguments]
    given = vars(parser.parse_args(plain))
    mine: JsonObject = {positional: given.pop(positional)}
    theirs: JsonObject = {}
    for key, text in given.items():
        field = fields.get(key) or beside[key]
        value = [_value(t, field) for t in text] if isinstance(text, list) else text
        value = _value(text, field) if isinstance(text, str) else value
        *parents, last = key.split(".")
        place = mine if key in fields else theirs
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = None if value == [None] else value
    return mine, theirs
