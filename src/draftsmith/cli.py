"""The command line. Flags mirror the recipe; errors of the user are one line and exit code 2."""

import contextlib
import errno
import io
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from draftsmith.errors import DraftsmithError, RecipeError
from draftsmith.progress import say
from draftsmith.recipe import Recipe, TargetRecipe, load_recipe

if TYPE_CHECKING:
    from draftsmith.pipeline import Run

StageName = Literal["run", "prompts", "regenerate", "vocab", "train", "export", "evaluate", "report"]
STAGE_NAMES = StageName.__args__  # type: ignore[attr-defined]
PLACEHOLDER = Recipe(name="from the recipe", target=TargetRecipe(model="from the recipe"))


@dataclass
class StageCommand:
    """Make a draft model for speculative decoding.

    `run` goes through all stages; a stage's name runs that stage alone. Finished stages are skipped.
    """

    command: tyro.conf.Positional[StageName]
    """run, or one stage: prompts, regenerate, vocab, train, export, evaluate, report."""
    recipe: tyro.conf.Positional[Path]
    """YAML file, for example recipes/gemma3-270m-quick.yaml."""
    out: Path | None = None
    """Run directory; left out: runs/NAME."""
    dry_run: bool = False
    """Print the resolved recipe and what each stage would do, then stop."""
    check: Literal["vllm", "sglang"] | None = None
    """After export: start this engine and compare it with the embedded one, token by token and depth by depth."""
    overrides: Annotated[Recipe, tyro.conf.arg(name="")] = field(default_factory=lambda: PLACEHOLDER)


@dataclass
class ServeCommand:
    """Start vLLM or SGLang with the run's draft, and stop it on Ctrl-C."""

    command: tyro.conf.Positional[Literal["serve"]]
    recipe: tyro.conf.Positional[Path]
    """YAML file of the run."""
    out: Path | None = None
    """Run directory; left out: runs/NAME."""
    purpose: Literal["draft", "plain", "capture", "last"] = "draft"
    """draft: what users run; plain: the target alone; capture: the target keeping hidden states for `train`; last:
    SGLang's other half of it."""
    print: bool = False
    """Print the command instead of running it."""
    overrides: Annotated[Recipe, tyro.conf.arg(name="")] = field(default_factory=lambda: PLACEHOLDER)


@dataclass
class InspectCommand:
    """Read any EAGLE-3 draft directory and name every problem an engine would swallow silently."""

    command: tyro.conf.Positional[Literal["inspect"]]
    directory: tyro.conf.Positional[Path]
    """Directory with config.json and .safetensors files."""


@dataclass
class _Positions:
    """Only what is needed to find the recipe, whose values are the flags' defaults."""

    command: tyro.conf.Positional[str]
    recipe: tyro.conf.Positional[Path]


def parse(arguments: list[str]) -> StageCommand | ServeCommand | InspectCommand:
    """Two passes: the first finds the recipe file, the second takes every flag with the recipe's values as defaults."""
    if arguments[:1] == ["inspect"]:
        return _tyro_in_one_line(InspectCommand, args=arguments)
    default = PLACEHOLDER
    if (
        arguments[:1]
        and arguments[0] in (*STAGE_NAMES, "serve")
        and arguments[1:2]
        and not arguments[1].startswith("-")
    ):
        first, _ = tyro.cli(_Positions, args=arguments, return_unknown_args=True, add_help=False)
        default = load_recipe(first.recipe)
    blank: StageCommand | ServeCommand = StageCommand("run", Path("RECIPE"), overrides=default)
    if arguments[:1] == ["serve"]:
        blank = ServeCommand("serve", Path("RECIPE"), overrides=default)
    command = _tyro_in_one_line(
        type(blank),
        args=arguments,
        default=blank,
        config=(tyro.conf.AvoidSubcommands,),
    )
    if default is PLACEHOLDER:
        raise RecipeError(f"give the recipe right after the command: draftsmith {command.command} RECIPE [flags]")
    return command


_PYDANTIC = re.compile(
    r"parsing (\S+): \d+ validation errors? for \w+ (\S+) (.+?) \[type=\w+, input_value=(.+?), input_type"
)


def _tyro_in_one_line(command: type, **options) -> Any:
    """Parse; tyro's boxes, which quote pydantic in full, become one line that names the flag."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            return tyro.cli(command, prog="draftsmith", **options)
    except SystemExit as stopped:
        if not stopped.code:
            raise
        text = " ".join(re.sub(r"[\u2500-\u257f]|-{5,}", " ", printed.getvalue()).split())
        found = _PYDANTIC.search(text)
        if found:
            place, field_name, message, value = found.groups()
            key = f"{place}.{field_name}".removeprefix("overrides.")
            text = f"{key}: {value} given; {message[0].lower()}{message[1:]}"
        raise RecipeError(f"flags: {text.split(' For full helptext')[0]}") from None


def _serve(command: ServeCommand, run: "Run") -> int:
    from draftsmith.serving.launch import launch, serve
    from draftsmith.targets.ends import resolve_model

    recipe, purpose = command.overrides, command.purpose
    draft = run.draft_for(recipe.serve.engine) if purpose == "draft" else Path()
    layers = run.captured_layers if purpose == "capture" else ()
    launched = launch(recipe, resolve_model(recipe.target.model), draft, purpose, layers)
    if command.print:
        print(launched)
        return 0
    return serve(launched, recipe.serve.patience_s)


def execute(command: StageCommand | ServeCommand | InspectCommand) -> int:
    if isinstance(command, InspectCommand):
        from draftsmith.publishing.inspect import inspect

        return 0 if inspect(command.directory) else 1
    from draftsmith.pipeline import Run, command_line, explain, run_pipeline

    directory = command.out or Path("runs") / command.overrides.name
    run = Run(command.overrides, directory, command_line())
    if isinstance(command, ServeCommand):
        return _serve(command, run)
    if command.dry_run:
        print(explain(run))
        return 0
    import logging
    import warnings

    from draftsmith.allocator import keep_freed_memory

    keep_freed_memory()
    warnings.filterwarnings("ignore", module="transformers")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    with contextlib.closing(run):
        report = run_pipeline(run, None if command.command == "run" else command.command)
        if command.check and not run.check_draft(command.check):
            return 1
    if command.command in ("run", "report"):
        card = run.draft_directory / "README.md"
        print(
            f"report: {report}\ndraft:  {run.draft_directory}\ncard:   {card} (to be; the card stage is not built yet)"
        )
    return 0


def main() -> int:
    try:
        return execute(parse(sys.argv[1:]))
    except DraftsmithError as error:
        say(f"draftsmith: {error}", error=True)
    except KeyboardInterrupt:
        say("draftsmith: interrupted; what is finished is kept, the same command goes on from there")
    except OSError as error:
        if error.filename is None and error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        place = f" ({error.filename})" if error.filename else ""
        say(f"draftsmith: {error.strerror}{place}; mend it or give another --out; what is finished is kept", error=True)
    return 2


if __name__ == "__main__":
    sys.exit(main())
