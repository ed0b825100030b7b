"""The command line. Flags mirror the recipe; errors of the user are one line and exit code 2."""

import contextlib
import difflib
import errno
import importlib
import logging
import signal
import sys
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

from draftsmith.commands import GROUPS, NAMES, STAGES
from draftsmith.core import terminal
from draftsmith.core.errors import DraftsmithError, RecipeError, out_of_memory, shortage
from draftsmith.core.progress import say

# Of disks and terminals; no file is named where a write fails, nor (ENOENT) where none can be made in any temporary
# directory.
DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ESTALE, errno.ENOENT}


def overview() -> str:
    """What `draftsmith --help` prints: every command in a line."""
    lines = [f"draftsmith {version('draftsmith')}: draft models for speculative decoding", ""]
    lines += ["usage: draftsmith COMMAND RECIPE [flags]; every key of the recipe is a flag, such as --train.epochs 4"]
    for group, commands in GROUPS.items():
        lines += ["", group, *(f"  {name:<11} {what}" for name, what in commands.items())]
    lines += ["", "draftsmith COMMAND --help explains its flags. Begin with: draftsmith init MODEL"]
    return "\n".join(lines)


def find(name: str) -> Any:
    """The command's class; a name that is none is a `RecipeError` with the nearest one."""
    if name not in NAMES:
        near = difflib.get_close_matches(name, NAMES, n=1)
        hint = f"did you mean {near[0]}?" if near else "draftsmith --help lists the commands"
        raise RecipeError(f"{name}: no such command; {hint}")
    module = "stages" if name in STAGES else name
    return getattr(importlib.import_module(f"draftsmith.commands.{module}"), module.capitalize())


def parse(arguments: list[str]) -> tuple[Any, Any]:
    """(the command, its recipe with the flags in place of its values; None for a command without one)."""
    from pydantic import ValidationError

    from draftsmith.commands.base import RecipeCommand
    from draftsmith.commands.flags import read
    from draftsmith.core.recipe import Recipe
    from draftsmith.core.recipe_file import load_recipe, one_line

    name, *rest = arguments
    kind = find(name)
    about = " ".join((kind.__doc__ or "").split())
    with_recipe = issubclass(kind, RecipeCommand)
    if with_recipe:
        about += " Every key of the recipe is a flag too, such as --train.epochs 4; --help-all shows them."
    own_alone = not with_recipe or not {"--help", "-h"}.isdisjoint(rest)
    rest = ["--help" if argument == "--help-all" else argument for argument in rest]
    own, flags = read(kind, None if own_alone else Recipe, f"draftsmith {name}", about, rest)
    try:
        command = kind.model_validate(own | ({"stage": name} if name in STAGES else {}))
    except ValidationError as error:
        key, _, why = one_line(error).partition(":")
        raise RecipeError(f"flags: --{key.replace('_', '-')}:{why}") from None
    return command, load_recipe(command.recipe, flags) if with_recipe else None


def quiet_libraries() -> None:
    from transformers.utils import logging as transformers_logging

    from draftsmith.core.allocator import keep_freed_memory

    keep_freed_memory()
    warnings.filterwarnings("ignore", module="transformers")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()


def execute(arguments: list[str]) -> int:
    command, recipe = parse(arguments)
    if arguments[0] not in ("serve", "publish", "inspect"):  # those need no model library
        quiet_libraries()
    if recipe is not None:
        from draftsmith.runs.run import Run

    terminal.on_interrupt(signal.default_int_handler)  # from here on there are things to put in order
    if recipe is None:
        return command()
    run = Run(recipe, command.out or Path("runs") / recipe.name, ["draftsmith", *sys.argv[1:]])
    reads = arguments[0] in ("plan", "publish", "serve") or getattr(command, "dry_run", False)  # nobody need wait
    writing = run.lock if not reads and run.processes.main else contextlib.nullcontext()
    with contextlib.closing(run), writing:
        return command(run)


def main() -> int:
    arguments = sys.argv[1:]
    try:
        if arguments in ([], ["-h"], ["--help"], ["help"]):
            print(overview())
            return 0 if arguments else 2
        if arguments in (["--version"], ["version"]):
            print(f"draftsmith {version('draftsmith')}")
            return 0
        return execute(arguments)
    except DraftsmithError as error:
        say(f"draftsmith: {error}", error=True)
    except KeyboardInterrupt:
        terminal.on_interrupt(terminal.leave_at_once)
        say(terminal.INTERRUPTED)
        return terminal.EXIT_INTERRUPTED
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        say(f"draftsmith: {shortage(error)}; free the device, or give another --device", error=True)
    except OSError as error:
        if error.filename is None and error.errno not in DISK:
            raise
        place = f" ({error.filename})" if error.filename else ""
        say(f"draftsmith: {error.strerror}{place}; mend it or give another --out; what is finished is kept", error=True)
    return 2
