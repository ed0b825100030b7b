"""`draftsmith publish RECIPE`."""

from draftsmith.commands.base import RecipeCommand, Run
from draftsmith.core.errors import RecipeError


class Publish(RecipeCommand):
    """Upload the draft and its card to the Hugging Face hub. Says what it would do unless --really is given."""

    repo: str | None = None
    """owner/name; left out: card.repo."""
    really: bool = False
    """Upload. The token comes from HF_TOKEN."""
    public: bool = False
    """Make a new repository public; otherwise it is private until you open it on the hub."""

    def __call__(self, run: Run) -> int:
        from draftsmith.publishing.publish import publish

        repo = self.repo or run.recipe.card.repo
        if not repo:
            raise RecipeError("publish: no repository given; set card.repo or give --repo owner/name")
        run.require_whole_export()
        print(publish(run.files.draft, repo, self.really, self.public))
        return 0
