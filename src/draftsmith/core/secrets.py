"""Secrets are named, never written down: a recipe and a command name environment variables, and what would put a secret
itself into a file is refused. What could still hold one is masked before it is shown.
"""

import os
import re
import shlex
from collections.abc import Iterator, Sequence
from urllib.parse import urlsplit

MASK = "***"
SHORTEST = 4  # letters of a value that is looked for
LONGEST = 2000  # characters of a line
_FLAG = r"--(?:(?:[\w-]+[-_])?api[-_]key|(?:(?:hf|auth|access)[-_])?token|[\w-]*password)"
_VARIABLE = re.compile(r"\$(\w+)|\$\{(\w+)\}")
_ASSIGNED = re.compile(r"(\w*(?:KEY|TOKEN|PASSWORD|SECRET))=(.+)")
_AFTER_FLAG = re.compile(rf"""({_FLAG}(?:['"]:|['"]?[=,\s])\s*['"]?)(?![-$])[^\s'",\]]+""", re.IGNORECASE)
_IN_URL = re.compile(r"(://)[^\s/@'\"]+@")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+")
_named = {"HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"}


def read(name: str) -> str:
    """The value of an environment variable that holds a secret, which is masked from now on; empty where not set."""
    _named.add(name)
    return os.environ.get(name, "")


def masked(text: str) -> str:
    """Without passwords in URLs, words after flags that take a secret, and the values of variables that hold one."""
    text = _AFTER_FLAG.sub(rf"\1{MASK}", _IN_URL.sub(rf"\1{MASK}@", text))
    for value in (os.environ.get(name, "") for name in tuple(_named)):
        for part in {value, *value.split()[-1:]}:  # "Basic abc": abc alone, too
            text = text.replace(part, MASK) if len(part) >= SHORTEST else text
    return text


def line(text: str) -> str:
    """Masked, and one line that has an end: what others wrote or answered may hold line ends, what a terminal obeys,
    and anything that turns its direction."""
    text = _CONTROL.sub(" ", masked(text))
    if len(text) > LONGEST:
        text = f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


# --- what a recipe may hold; a ValueError says what is wrong ------------------------------------------------------


def no_password(text: str) -> str:
    if _IN_URL.search(text):
        raise ValueError(
            "a name or password stands in a URL, which a run would keep in its files; put the server's key into the "
            "environment variable that server.api_key_env names"
        )
    return text


def server_url(url: str) -> str:
    try:
        parts = urlsplit(no_password(url))
        right = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError as error:
        raise ValueError(f"{url!r} given; {error}") from None
    if not right or parts.query or parts.fragment:
        raise ValueError(f"{url!r} given; a server's URL is like http://HOST:PORT or https://[::1]:8000/PATH")
    return url.rstrip("/")


def variable(name: str) -> str:
    if not re.fullmatch(r"[A-Z_][A-Z0-9_]*", name):
        raise ValueError(
            "is to name an environment variable, in capitals such as DRAFTSMITH_API_KEY, which holds the key"
        )
    return name


def command_line(text: str) -> str:
    for _, flag, value in _given(shlex.split(text)):  # which raises where a quotation has no end
        if not _VARIABLE.fullmatch(value):
            raise ValueError(
                f"{flag}: write $NAME, an environment variable that holds the secret; a run keeps its recipe in files"
            )
    return text


# --- command lines ----------------------------------------------------------------------------------------------


def _given(words: Sequence[str]) -> Iterator[tuple[int, str, str]]:
    """(place, flag or variable, value) of every secret in a command line."""
    flag = ""
    for place, word in enumerate(words):
        value = word
        if word.startswith("-"):
            flag, _, value = word.partition("=")
            flag = flag if re.fullmatch(_FLAG, flag, re.IGNORECASE) else ""
        elif assigned := _ASSIGNED.fullmatch(word):
            yield place, assigned[1], assigned[2]
            continue
        if flag and value:
            yield place, flag, value


def filled_in(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """(the words with secrets in the place of their `$NAME`, the names that are not set)."""
    filled, missing = list(words), []
    for place, _, value in _given(words):
        if found := _VARIABLE.fullmatch(value):
            name = found[1] or found[2]
            filled[place] = words[place].removesuffix(value) + read(name)
            missing += [] if os.environ.get(name) else [name]
    return filled, missing


def shell_line(words: Sequence[str]) -> str:
    """For a shell, which fills the secrets in itself."""
    quoted = [shlex.quote(word) for word in words]
    for place, _, value in _given(words):
        if _VARIABLE.fullmatch(value):
            before = words[place].removesuffix(value)
            quoted[place] = f'{shlex.quote(before) if before else ""}"{value}"'
    return " ".join(quoted)
