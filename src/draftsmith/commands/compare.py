"""`draftsmith compare RECIPE`."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

from draftsmith.commands.base import RecipeCommand, Run
from draftsmith.core import files, run_files
from draftsmith.core.errors import DataError


class Compare(RecipeCommand):
    """Decode with several drafts of the same target on the same prompts, at every shape and temperature of `evaluate`:
    one table, one plot, and differences to the first draft, the run's own where it has one."""

    drafts: tuple[Path, ...] = ()
    """Draft directories, ours or others', beside the run's own."""
    taps: Literal["auto", "inputs", "outputs"] = "auto"
    """How others' explicit layer ids are meant: of layer inputs, as vLLM does, or of outputs, as SGLang does; auto:
    nested in eagle_config as outputs, at the top level as inputs."""

    def __call__(self, run: Run) -> int:
        """Print the table; write compare/compare.json and compare.svg."""
        from draftsmith.core.records.evaluation import Comparison
        from draftsmith.drafts.directories import load_draft
        from draftsmith.engines import ENGINES
        from draftsmith.evaluation.compare import measure, page, pair_up, plot
        from draftsmith.runs.estimates import speeds_of

        run.tell_unasked_url("compare")
        prompts, own = run.files.evaluation_prompts, run.files.draft
        if not prompts.exists():
            raise DataError(f"compare: {prompts} is missing; run: draftsmith prompts RECIPE")
        directories = list(dict.fromkeys([*([own] if (own / run_files.WEIGHTS).exists() else []), *self.drafts]))
        if len(directories) < 2:
            raise DataError(
                f"compare: {len(directories)} draft found; give others with --drafts DIRECTORY [DIRECTORY ...]"
            )
        layers, engine = run.target.identity.num_layers, ENGINES[run.engine_of("evaluate")]
        for directory in directories:  # one that is no draft is told before any is measured
            load_draft(directory, layers=layers, reading=self.taps)
        out = run.files.comparison.parent
        sets = run.evaluation_sets()
        base = replace(run.setup(engine.name, out, own), reading=self.taps)
        drafts = [measure(engine, replace(base, draft=d), layers, prompts, out, sets) for d in directories]
        drafts = pair_up([draft.model_copy(update={"predicted": speeds_of(run, draft)}) for draft in drafts])
        Comparison(created_with=run.created_with, drafts=drafts).save(run.files.comparison)
        picture = run.files.comparison.with_suffix(".svg")
        files.write_atomic(picture, str(plot(drafts)))
        print(f"{page(drafts)}\n\ncompare: {run.files.comparison}, {picture}")
        return 0
