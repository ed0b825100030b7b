"""What a row of a data set asks: its user turns, system prompt and tools, whatever form the row has.

A user turn that a draft cannot learn from ends its conversation; the turns before it stay. What is left out is named.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import orjson

from draftsmith.core.errors import DataError
from draftsmith.core.files import JsonObject

DIALOGUES = ("messages", "conversations", "conversation", "turns")  # lists of turns; the first that is filled counts
TEXTS = ("prompt", "instruction", "question", "problem")  # one user turn
MEDIA = ("image", "images", "video", "videos", "audio", "audios")
IDS = ("id", "question_id", "task_id", "prompt_id")
ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    # a function call is written by the assistant, so the target writes its own
    **dict.fromkeys(
        ("assistant", "gpt", "chatgpt", "bard", "bing", "claude", "bot", "model", "function_call", "tool_call"),
        "assistant",
    ),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("tool", "function", "observation", "function_response", "tool_response", "ipython"), "tool"),
}


class NothingToAsk(DataError):
    """A well-formed row without a user turn for us; `reasons` as they are counted."""

    def __init__(self, reasons: set[str]):
        super().__init__(", ".join(sorted(reasons)))
        self.reasons = reasons


class Unusable(DataError):
    """A well-formed user turn that no draft can learn from; the text is the reason as it is counted."""


def read_row(row: Any, max_turns: int) -> tuple[list[dict[str, str]], list[JsonObject], set[str]]:
    """Of a row in any known form: a system turn, if any, and the user turns, as {"role", "content"}; tools to offer in
    the chat template, mostly none; reasons why something of the row is not here.

    Raises `NothingToAsk`, or `DataError` where the row is malformed. Turns after the last user turn that is kept are
    not looked at.
    """
    if not isinstance(row, dict):
        raise DataError("not an object")
    left_out: set[str] = set()
    systems = [row[key] for key in ("system", "system_prompt") if row.get(key)]
    users: list[str] = []
    try:
        for role, content in _turns(row):
            if role == "user":
                # an image beside the text belongs to the first question
                medium = next((key for key in MEDIA if _filled(row.get(key))), None)
                if medium:
                    raise Unusable(f"{medium} beside the text")
                if text := _text(content):
                    users.append(text)
                else:
                    left_out.add("empty user turn")
            elif role == "system" and not users:
                systems.append(content)
            elif role == "system":
                left_out.add("system turn after the first user turn")
            elif role == "tool":
                left_out.add("tool turn")
                if users:  # what follows rests on an answer that the target did not ask for
                    break
            elif not users:
                left_out.add("assistant turn before the first user turn")
            if len(users) == max_turns:
                break
    except Unusable as error:
        left_out.add(str(error))
    except DataError:
        if not users:
            raise
        left_out.add("malformed turn")
    if not users:
        raise NothingToAsk(left_out or {"no user turn"})
    system = _system(systems, left_out)
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": "user", "content": text} for text in users]
    return messages, _tools(row.get("tools"), left_out), left_out


def map_columns(row: Any, columns: Mapping[Any, str]) -> Any:
    """The row under our names; `columns` is {our name: the row's key}. A mapped text or dialogue is the only one.

    Raises `DataError` where the row is an error instead, or lacks all columns with what to ask.
    """
    if isinstance(row, Exception):
        raise DataError(f"not JSON: {row}")
    if not columns or not isinstance(row, dict):
        return row
    forms = {*DIALOGUES, *TEXTS, "input"}
    mapped = {ours: row[theirs] for ours, theirs in columns.items() if theirs in row}
    asked = forms & columns.keys()
    if asked and not asked & mapped.keys():
        ours = min(asked)
        raise DataError(f"columns: {ours}: {columns[ours]!r} is no column (found: {', '.join(row) or 'none'})")
    return {**{key: value for key, value in row.items() if not asked or key not in forms}, **mapped}


def label(row: JsonObject, *keys: str) -> str:
    """The first of these fields that holds a name or a number; "" if none does."""
    for key in keys:
        value = row.get(key)
        if isinstance(value, str | int | float) and not isinstance(value, bool) and (name := clean(str(value))):
            return name
    return ""


def clean(text: str) -> str:
    """Without surrounding blanks; halves of a surrogate pair are joined, or replaced where one is missing."""
    text = text.strip()
    try:
        text.encode()
    except UnicodeEncodeError:
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _filled(value: Any) -> bool:
    return any(value) if isinstance(value, list) else bool(value.strip() if isinstance(value, str) else value)


def _turns(row: JsonObject) -> Iterator[tuple[str, Any]]:
    """(user, assistant, system or tool; content) of every turn; raises `DataError` where one is malformed."""
    known = [key for key in (*DIALOGUES, *TEXTS) if key in row]
    key = next((key for key in known if row[key] not in (None, "", [])), None)
    if key is None and known:
        raise Unusable(f"empty {known[0]}")
    if key is None:
        raise DataError(
            f"has none of the keys {', '.join((*TEXTS, *DIALOGUES))} (found: {', '.join(row) or 'none'}); "
            "name yours in the source's columns"
        )
    value = row[key]
    if key in DIALOGUES or (isinstance(value, list) and all(isinstance(m, dict) and _role(m) for m in value)):
        yield from _dialogue(value, key)
        return
    if key == "instruction":  # Alpaca's
        yield from _history(row.get("history"))
        value = "\n\n".join(text for text in (_text(value), _text(row.get("input") or "")) if text)
    yield "user", value


def _history(rounds: Any) -> Iterator[tuple[str, Any]]:
    """Earlier [question, answer] pairs, as LLaMA-Factory keeps them."""
    if isinstance(rounds, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in rounds):
        for question, answer in rounds:
            yield "user", question
            yield "assistant", answer


def _role(message: JsonObject) -> Any:
    return message.get("role") or message.get("from")


def _dialogue(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    turns = _from_json(value)
    if not isinstance(turns, list):
        raise DataError(f"its {key} are no list of turns")
    for number, turn in enumerate(turns):
        if isinstance(turn, str):  # benchmark questions hold user texts; UltraChat and LIMA alternate
            yield ("user" if key == "turns" or number % 2 == 0 else "assistant"), turn
            continue
        if not isinstance(turn, dict):
            raise DataError("a turn is neither an object nor a text")
        name = _role(turn) or ("user" if key == "turns" else None)
        role = ROLES.get(str(name).strip().lower().replace("-", "_"))
        if role is None:
            raise DataError(f"a turn's role is {name!r}; known are {', '.join(ROLES)}")
        yield role, turn["content"] if turn.get("content") is not None else turn.get("value")


def _text(content: Any) -> str:
    """The text of a turn; raises `Unusable` for anything but text, `DataError` for what is no content at all."""
    if isinstance(content, str):
        return clean(content)
    parts = [content] if isinstance(content, dict) else content
    if not isinstance(parts, list):
        raise DataError("a turn lacks a text")
    texts = []
    for part in parts:
        if not isinstance(part, dict):
            part = {"text": part}
        kind = part.get("type") or next((key for key, value in part.items() if value is not None), None)
        if kind not in ("text", "input_text"):
            raise Unusable(f"{clean(str(kind))[:40]} in a user turn")
        if not isinstance(text := part.get("text"), str):
            raise DataError("a turn has a text part without a text")
        texts.append(text)
    return clean("\n".join(texts))


def _system(contents: list[Any], left_out: set[str]) -> str:
    """One system prompt of all that stand before the first user turn; the same text twice is one."""
    texts: dict[str, None] = {}
    for content in contents:
        try:
            texts[_text(content)] = None
        except DataError:
            left_out.add("system prompt that is no text")
    return "\n\n".join(text for text in texts if text)


def _from_json(value: Any) -> Any:
    """Tables keep lists as JSON text; what is none stays as it is."""
    if isinstance(value, str):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _tools(value: Any, left_out: set[str]) -> list[JsonObject]:
    value = _from_json(value or [])
    try:
        tools = [_without_nulls(_from_json(tool)) for tool in value] if isinstance(value, list) else [value]
        if all(isinstance(tool, dict) for tool in tools):
            return orjson.loads(orjson.dumps(tools))
    except (TypeError, RecursionError):  # numbers beyond 64 bits, broken surrogates, thousands of levels
        pass
    left_out.add("tools that are no list of objects")
    return []


def _without_nulls(value: Any) -> Any:
    """Tables give every tool the parameters of all tools, most of them null."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value
