"""The command line. Flags mirror the recipe; errors of the user are one line and exit code 2."""

import contextlib
import difflib
import errno
import io
import re
import sys
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from draftsmith.errors import DraftsmithError, RecipeError
from draftsmith.progress import say
from draftsmith.recipe import Recipe, TargetRecipe, load_recipe

if TYPE_CHECKING:
    from draftsmith.run import Run

StageName = Literal["run", "prompts", "regenerate", "vocab", "train", "export", "evaluate", "report", "card"]
PLACEHOLDER = Recipe(name="from the recipe", target=TargetRecipe(model="from the recipe"))


@dataclass
class RecipeCommand:
    """What every command about a run takes."""

    command: tyro.conf.Positional[str]
    recipe: tyro.conf.Positional[Path]
    """YAML file, for example recipes/smollm2-135m-quick.yaml."""
    out: Path | None = None
    """Run directory; left out: runs/NAME."""
    overrides: Annotated[Recipe, tyro.conf.arg(name="")] = field(default_factory=lambda: PLACEHOLDER)


@dataclass
class StageCommand(RecipeCommand):
    """Make a draft model for speculative decoding.

    `run` goes through all stages; a stage's name runs that stage alone. Finished stages are skipped.
    """

    command: tyro.conf.Positional[StageName]
    """run, or one stage: prompts, regenerate, vocab, train, export, evaluate, report, card."""
    dry_run: bool = False
    """Print the resolved recipe and what each stage would do, then stop."""
    check: Literal["vllm", "sglang"] | None = None
    """After export: start this engine and compare it with the embedded one, token by token and depth by depth."""


@dataclass
class ServeCommand(RecipeCommand):
    """Start vLLM or SGLang with the run's draft, and stop it on Ctrl-C."""

    command: tyro.conf.Positional[Literal["serve"]]
    purpose: Literal["draft", "plain", "capture", "last"] = "draft"
    """draft: what users run; plain: the target alone; capture: the target keeping hidden states for `train`; last:
    SGLang's other half of it."""
    print: bool = False
    """Print the command instead of running it."""


@dataclass
class ProbeCommand(RecipeCommand):
    """Measure what a speed-up depends on, here or on a running server. Needs no trained draft."""

    command: tyro.conf.Positional[Literal["probe"]]
    url: str | None = None
    """Measure a server of the target alone (engine: serve.engine) instead of this machine."""
    draft_url: str | None = None
    """A second server that drafts serve.shape for the same target; tells what drafting costs there."""


@dataclass
class PredictCommand(RecipeCommand):
    """Tell the speed-up of every shape and batch size, here or on a named machine, before anyone trains or rents."""

    command: tyro.conf.Positional[Literal["predict"]]
    hardware: str | None = None
    """A machine by name, or a probe's JSON file; left out: the run's probe.json."""
    tau: float | None = None
    """A published accept length instead of the run's own profile; 1 + accepted / steps."""
    shape: str = "3/1/4"
    """The shape that --tau was measured at: steps/top-k/draft tokens."""
    batches: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    """Sequences decoded at once."""
    context: int = 512
    """Cached tokens of each."""
    correlation: float = 0.0
    """MoE only: 0 neighbouring tokens choose experts independently, 1 they share them all."""


@dataclass
class TuneCommand(RecipeCommand):
    """Find the fastest shape by measuring; `serve` takes what is found."""

    command: tyro.conf.Positional[Literal["tune"]]
    engine: Literal["auto", "embedded", "vllm", "sglang"] = "auto"
    """What decodes: the embedded engine, or servers started as `serve` does; auto: whatever runs the target."""
    budget_s: float = 300.0
    """Seconds after which the best so far is taken; starts of engines count."""


@dataclass
class PlanCommand(RecipeCommand):
    """Bytes, memory, hours and machines of a run, before anything runs."""

    command: tyro.conf.Positional[Literal["plan"]]
    hardware: str | None = None
    """A machine by name, or a probe's JSON file; left out: the run's probe.json."""
    trainer_gpus: int | None = None
    """GPUs that train; left out: those of one machine."""
    completion_tokens: int | None = None
    """Mean length of the target's answers; left out: 43 % of regenerate.max_new_tokens."""
    network_gbit: float | None = None
    """Network between target and trainer, in Gbit/s; left out: 25."""
    against: Path | None = None
    """A finished run directory: print what was planned beside what it really took."""


@dataclass
class CompareCommand(RecipeCommand):
    """Decode with several drafts of the same target on the same prompts; one table, one plot."""

    command: tyro.conf.Positional[Literal["compare"]]
    drafts: tuple[Path, ...] = ()
    """Draft directories, ours or others', beside the run's own."""
    taps: Literal["auto", "sglang", "vllm"] = "auto"
    """How others' explicit layer ids are meant: sglang layer outputs, vllm layer inputs; auto: nested in eagle_config
    as SGLang's, at the top level as vLLM's."""


@dataclass
class PublishCommand(RecipeCommand):
    """Upload the draft and its card to the Hugging Face hub. Says what it would do unless --really is given."""

    command: tyro.conf.Positional[Literal["publish"]]
    repo: str | None = None
    """owner/name; left out: card.repo."""
    really: bool = False
    """Upload. The token comes from HF_TOKEN."""
    public: bool = False
    """Make a new repository public; otherwise it is private until you open it on the hub."""


@dataclass
class InitCommand:
    """Write a commented recipe for any model, and tell what its files do not say."""

    command: tyro.conf.Positional[Literal["init"]]
    model: tyro.conf.Positional[str]
    """Directory, hub name, or an embedded target."""
    data: Path | None = None
    """Your own prompts or conversations, a file or folder; left out: 6,000 public prompts that come along."""
    out: Path | None = None
    """Where to write it; left out: NAME-eagle3.yaml here."""
    hardware: str | None = None
    """The machine to choose sizes for, by name (see plan); left out: this one."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off unless you trust its author."""


@dataclass
class InspectCommand:
    """Read any EAGLE-3 draft directory and name every problem an engine would swallow silently."""

    command: tyro.conf.Positional[Literal["inspect"]]
    directory: tyro.conf.Positional[Path]
    """Directory with config.json and .safetensors files."""


COMMANDS: dict[str, type[RecipeCommand]] = {
    **dict.fromkeys(StageName.__args__, StageCommand),  # type: ignore[attr-defined]
    "serve": ServeCommand,
    "probe": ProbeCommand,
    "predict": PredictCommand,
    "tune": TuneCommand,
    "plan": PlanCommand,
    "compare": CompareCommand,
    "publish": PublishCommand,
}


ALONE: dict[str, type[InspectCommand | InitCommand]] = {"inspect": InspectCommand, "init": InitCommand}
GROUPS = {
    "begin": ("init", "plan", "probe", "predict"),
    "make a draft": ("run",),
    "its stages": ("prompts", "regenerate", "vocab", "train", "export", "evaluate", "report", "card"),
    "use it": ("serve", "tune", "compare", "inspect", "publish"),
}


def overview() -> str:
    """What `draftsmith --help` prints: every command in a line."""
    from draftsmith.pipeline import STAGES

    stages = {stage.name: stage.what for stage in STAGES} | {"card": "write the model card", "run": "all stages"}
    lines = [f"draftsmith {version('draftsmith')}: draft models for speculative decoding", ""]
    lines += ["usage: draftsmith COMMAND RECIPE [flags]; every key of the recipe is a flag, such as --train.epochs 4"]
    for group, names in GROUPS.items():
        lines += ["", group]
        for name in names:
            what = stages.get(name) or " ".join(((ALONE | COMMANDS)[name].__doc__ or "").split()).split(". ")[0]
            lines.append(f"  {name:<11} {what[0].lower()}{what[1:].rstrip('.')}")
    lines += ["", "draftsmith COMMAND --help explains its flags. Begin with: draftsmith init MODEL"]
    return "\n".join(lines)


@dataclass
class _Positions:
    """Only what is needed to find the recipe, whose values are the flags' defaults."""

    command: tyro.conf.Positional[str]
    recipe: tyro.conf.Positional[Path]


def parse(arguments: list[str]) -> RecipeCommand | InspectCommand | InitCommand:
    """Two passes: the first finds the recipe file, the second takes every flag with the recipe's values as defaults."""
    if arguments[:1] and arguments[0] in ALONE:
        if len(arguments) == 1:
            raise RecipeError(f"usage: draftsmith {arguments[0]} {'MODEL' if arguments[0] == 'init' else 'DIRECTORY'}")
        return _tyro_in_one_line(ALONE[arguments[0]], args=arguments)
    if arguments[:1] and arguments[0] not in COMMANDS and not arguments[0].startswith("-"):
        near = difflib.get_close_matches(arguments[0], [*COMMANDS, *ALONE], n=1)
        hint = f"did you mean {near[0]}?" if near else "draftsmith --help lists the commands"
        raise RecipeError(f"{arguments[0]}: no such command; {hint}")
    name = arguments[0] if arguments and arguments[0] in COMMANDS else "run"
    default = PLACEHOLDER
    if name in arguments[:1] and arguments[1:2] and not arguments[1].startswith("-"):
        first, _ = tyro.cli(_Positions, args=arguments[:2], return_unknown_args=True, add_help=False)
        default = load_recipe(first.recipe)
    kind = COMMANDS[name]
    command = _tyro_in_one_line(
        kind,
        args=arguments,
        default=kind(name, Path("RECIPE"), overrides=default),
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
    alone = command not in (StageCommand, *ALONE.values())  # its one name is no choice, so tyro does not show it
    prog = f"draftsmith {options['args'][0]}" if alone else "draftsmith"
    try:
        with contextlib.redirect_stderr(printed):
            return tyro.cli(command, prog=prog, **options)
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
    from draftsmith.serving.launch import serve

    launched = run.serving(command.purpose)
    if command.print:
        print(launched)
        return 0
    return serve(launched, run.recipe.serve.patience_s)


def _quiet_libraries() -> None:
    import logging
    import warnings

    from draftsmith.allocator import keep_freed_memory

    keep_freed_memory()
    warnings.filterwarnings("ignore", module="transformers")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


def _stages(command: StageCommand, run: "Run") -> int:
    from draftsmith.pipeline import explain, run_pipeline

    if command.dry_run:
        print(explain(run))
        return 0
    if command.command == "card":
        print(f"card:   {_card(run)}")
        return 0
    report = run_pipeline(run, None if command.command == "run" else command.command)
    if command.check and not run.check_draft(command.check):
        return 1
    if command.command == "report":
        print(f"report: {report}")
    if command.command == "run" and run.world.main:
        print(f"report: {report}\ndraft:  {run.draft_directory}")
        try:
            print(f"card:   {_card(run)}")
        except RecipeError as error:  # the draft is done; only its card has to wait
            print(f"card:   none yet; {error}")
        for engine, line in run.serve_commands.items():
            print(f"\nserve it on {engine}:\n  {line}")
    return 0


def _card(run: "Run") -> Path:
    from draftsmith.hardware.commands import card_prediction
    from draftsmith.publishing.card import write_card

    return write_card(run, card_prediction(run))


def _publish(command: PublishCommand, run: "Run") -> int:
    from draftsmith.publishing.publish import publish

    repo = command.repo or run.recipe.card.repo
    if not repo:
        raise RecipeError("publish: no repository given; set card.repo or give --repo owner/name")
    print(publish(run.path("export"), repo, command.really, command.public))
    return 0


def _init(command: InitCommand) -> int:
    _quiet_libraries()
    from draftsmith.init import init

    path, unknown = init(
        command.model, command.data, command.out, command.hardware, command.revision, command.trust_remote_code
    )
    print(f"recipe: {path}")
    for what in unknown:
        print(f"  not known: {what}")
    hardware = f" --hardware {command.hardware}" if command.hardware else ""
    first = f"draftsmith plan {path}{hardware}" if hardware else f"draftsmith probe {path} && draftsmith plan {path}"
    print(f"next:   {first}\n        draftsmith run {path}")
    return 0


def execute(command: RecipeCommand | InspectCommand | InitCommand) -> int:
    if isinstance(command, InitCommand):
        return _init(command)
    if isinstance(command, InspectCommand):
        from draftsmith.publishing.inspect import inspect

        return 0 if inspect(command.directory) else 1
    from draftsmith.hardware import commands as hardware
    from draftsmith.pipeline import command_line
    from draftsmith.run import Run

    directory = command.out or Path("runs") / command.overrides.name
    with contextlib.closing(Run(command.overrides, directory, command_line())) as run:
        match command:
            case ServeCommand():
                return _serve(command, run)
            case PublishCommand():
                return _publish(command, run)
        _quiet_libraries()
        match command:
            case StageCommand():
                return _stages(command, run)
            case ProbeCommand():
                hardware.probe(run, command.url, command.draft_url)
            case PredictCommand():
                c = command
                hardware.predict(run, c.hardware, c.tau, c.shape, c.batches, c.context, c.correlation)
            case TuneCommand():
                hardware.tune(run, command.engine, command.budget_s)
            case PlanCommand():
                p = command
                hardware.plan(run, p.hardware, p.trainer_gpus, p.against, p.completion_tokens, p.network_gbit)
            case CompareCommand():
                from draftsmith.publishing.compare import compare

                compare(run, command.drafts, command.taps)
    return 0


def main() -> int:
    arguments = sys.argv[1:]
    try:
        if arguments in ([], ["-h"], ["--help"], ["help"]):
            print(overview())
            return 0 if arguments else 2
        if arguments in (["--version"], ["version"]):
            print(f"draftsmith {version('draftsmith')}")
            return 0
        return execute(parse(arguments))
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
