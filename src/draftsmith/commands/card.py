"""`draftsmith card RECIPE`."""

from draftsmith.commands.base import RecipeCommand, Run


class Card(RecipeCommand):
    """Write the model card beside the exported draft, from what was measured."""

    def __call__(self, run: Run) -> int:
        from draftsmith.publishing.card import write_card
        from draftsmith.runs.estimates import card_prediction

        print(f"card:   {write_card(run, card_prediction(run))}")
        return 0
