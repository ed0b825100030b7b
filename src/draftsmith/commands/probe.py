"""`draftsmith probe RECIPE`."""

from draftsmith.commands.base import RecipeCommand, Run
from draftsmith.core.errors import RecipeError
from draftsmith.core.recipe import ServerUrl


class Probe(RecipeCommand):
    """Measure what a speed-up depends on, here or on a running server. Needs no trained draft.

    Without a server and without a target in this process the machine alone is measured, its links included; a
    prediction for it is then a roofline over what was measured.
    """

    url: ServerUrl | None = None
    """Measure a server of the target alone (engine: serve.engine) instead of this machine."""
    draft_url: ServerUrl | None = None
    """A second server that drafts serve.shape for the same target; tells what drafting costs there."""

    def __call__(self, run: Run) -> int:
        if self.draft_url is not None and self.url is None:
            raise RecipeError("--draft-url: give --url too, a server of the target alone to compare it with")
        from draftsmith.runs.probing import page, probe_here, probe_server

        if self.url is not None:
            engine = run.recipe.serve.engine
            probe = probe_server(run, engine, self.url, self.draft_url, run.serving_shape(engine)[0])
            out = run.files.probe(engine)
        else:
            probe, out = probe_here(run), run.files.probe()
        probe.save(out)
        print(f"{page(probe)}\n\nprobe: {out}")
        return 0
