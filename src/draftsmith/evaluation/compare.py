"""`draftsmith compare`: several drafts of one target on the same prompts, side by side with intervals."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from draftsmith.core import files
from draftsmith.core.errors import DataError
from draftsmith.core.progress import say
from draftsmith.core.recipe import MEASURED_WITH
from draftsmith.core.records.data import EvaluationPrompts
from draftsmith.core.records.evaluation import Acceptance, ComparedDraft, PairedDifference, PlainReference, Profile
from draftsmith.core.tables import table
from draftsmith.decoding.sampling import Sampling
from draftsmith.drafts.directories import inspect_draft, load_draft
from draftsmith.engines.base import Engine, Setup
from draftsmith.evaluation.acceptance import paired_difference
from draftsmith.evaluation.asking import complete
from draftsmith.evaluation.draft_sampling import taking
from draftsmith.evaluation.evaluate import NO_TEMPERATURE, PROFILE_PROMPTS, Evaluation
from draftsmith.evaluation.plots import interval_plot


def measure(
    engine: Engine, setup: Setup, layers: int, prompts: Path, out: Path, sets: Sequence[EvaluationPrompts] = ()
) -> ComparedDraft:
    """One draft's row: acceptance at every shape and temperature of `evaluate`, its profile, coverage and size."""
    here = setup.recipe.evaluate.model_copy(update={"url": None})  # whose server has one draft
    setup = replace(setup, recipe=setup.recipe.model_copy(update={"evaluate": here}))
    recipe, directory = setup.recipe, setup.draft
    report = inspect_draft(directory)
    draft, ids_D = load_draft(directory, layers=layers, reading=setup.reading)
    key = files.digest(
        *sorted(directory.glob("*.safetensors")),
        directory / "config.json",
        prompts,
        recipe.evaluate.model_dump(mode="json", exclude={"sets"}),
        recipe.target.model_dump(mode="json"),
        engine.name,
        recipe.serve.model_dump(mode="json", include=MEASURED_WITH),
        recipe.regenerate.max_prompt_tokens,
        recipe.seed,
        setup.reading,
    )
    evaluation = Evaluation(engine, setup, prompts, out / key[:12], sets)
    say(f"compare: {directory}: reads HF hidden_states {list(draft.config.taps)}")
    for problem in report.serving:
        say(f"compare: {directory}: {problem}; measured all the same")
    found: dict[str, list[Acceptance]] = defaultdict(list)
    for shape, drafts, first in evaluation.ways():
        with engine.open(taking(setup, drafts), shape) as session:
            asked = evaluation.asked(session)
            questions = asked[""]
            for name, entry in evaluation.acceptances(session, asked, shape, drafts, first):
                found[name].append(entry)
    if not found:
        raise DataError(NO_TEMPERATURE)
    profile = None
    if engine.in_process:
        profile = evaluation.once("profile", Profile, partial(evaluation.profile, questions))

    def written() -> PlainReference:
        """Of what the target writes to the evaluation prompts: none of the drafts was made for them."""
        with engine.open(setup, None) as alone:
            chosen, length = questions[:PROFILE_PROMPTS], recipe.evaluate.max_new_tokens
            answers = complete(alone, chosen, "answers", Sampling(), length, None, evaluation.chat.stop)
        return PlainReference(outputs=[answer.ids for answer in answers], timed={})

    plain = evaluation.once("answers", PlainReference, written)
    ids, tokens = set(ids_D.tolist()), [token for answer in (plain.outputs if plain else []) for token in answer]
    return ComparedDraft(
        draft=str(directory),
        parameters=report.parameters,
        bytes=sum(path.stat().st_size for path in directory.glob("*.safetensors")),
        coverage=sum(token in ids for token in tokens) / len(tokens) if tokens else None,
        acceptance=found[""],
        sets=evaluation.measured_sets(asked, found),
        profile=profile,
        config=draft.config.model_dump(mode="json"),
    )


def pair_up(drafts: list[ComparedDraft]) -> list[ComparedDraft]:
    """Every entry with its paired difference to the first draft's of the same setting, where it has one."""
    first = {(name, e.setting): e.prompts for name, e in drafts[0].entries}

    def against(draft: ComparedDraft) -> list[PairedDifference]:
        return [paired_difference(first.get((name, e.setting), ()), e.prompts) for name, e in draft.entries]

    return [drafts[0], *(draft.model_copy(update={"against_first": against(draft)}) for draft in drafts[1:])]


def page(drafts: list[ComparedDraft]) -> str:
    """The comparison as text for a terminal."""
    rows, sizes = [], []
    for draft in drafts:
        paired: list[PairedDifference | None] = [*draft.against_first] or [None] * len(draft.entries)
        for (name, entry), difference in zip(draft.entries, paired, strict=True):
            tau = "too short" if entry.all.tau is None else str(entry.all)
            if difference is not None and difference.difference is not None:
                tau += f", {difference}"
            depths = "/".join("-" if share is None else f"{share:.2f}" for share in entry.acceptance_by_depth)
            categories = ", ".join(f"{c} {value.short}" for c, value in entry.by_category.items() if value.tau)
            if entry.macro is not None and len(entry.by_category) > 1:
                categories += f"; their mean {entry.macro:.2f}"
            if entry.unasked:
                categories += f"; {entry.unasked}"
            rows.append((draft.draft, name or "own prompts", entry.setting, tau, f"depths {depths}", categories))
        covered = "unknown" if draft.coverage is None else f"{draft.coverage:.1%}"
        speeds = ", ".join(f"{gain:.2f}x on {machine}" for machine, gain in draft.predicted.items()) or "nothing"
        sizes.append(
            (
                draft.draft,
                f"{draft.parameters / 1e6:.1f} M parameters, {draft.bytes / 1e6:.0f} MB, vocabulary covers {covered}, "
                f"predicted {speeds}",
            )
        )
    return f"{table(rows)}\n\n{table(sizes)}"


def _labels(drafts: Sequence[str]) -> list[str]:
    """A run's name or the directory's own; more of the path where that is not enough to tell them apart."""
    parts = [Path(draft).resolve().parts for draft in drafts]
    short = [p[-3] if p[-2] == "export" else p[-1] for p in parts]
    return short if len(set(short)) == len(short) else ["/".join(p[-3:]) for p in parts]


def plot(drafts: list[ComparedDraft]) -> str:
    """SVG: tau with its interval by category, one row per draft, shape and way of decoding."""
    labels = _labels([draft.draft for draft in drafts])
    rows = [(f"{label} {e.setting}", e) for label, draft in zip(labels, drafts, strict=True) for e in draft.acceptance]
    names = ["all", *sorted({name for _, e in rows for name in e.by_category})]
    series = {name: [e.all if name == "all" else e.by_category.get(name) for _, e in rows] for name in names}
    return interval_plot("tau, 95 % intervals over prompts", [row for row, _ in rows], series)
