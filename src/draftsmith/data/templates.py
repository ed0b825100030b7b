"""Conversations to token ids, turn by turn, with nothing ever tokenised twice."""

from jinja2 import TemplateError

from draftsmith.errors import DataError
from draftsmith.recipe import Template

_MARK = "\u241edraftsmith-turn\u241e"


class ChatFormat:
    """Renders the ids that stand before each assistant turn.

    With a recipe template the texts are the recipe's; otherwise they come from the tokenizer's own chat template.
    """

    def __init__(self, tokenizer, template: Template | None):
        if template is None and not tokenizer.chat_template:
            raise DataError(
                "target.template: the tokenizer has no chat template; give one, for example "
                '{user: "User: {content}\\n", assistant: "Assistant:", stop: ["\\nUser:"]}'
            )
        self.tokenizer = tokenizer
        self.template = template
        self.stop: tuple[str, ...] = template.stop if template else ()

    def first_turn(self, user: str, system: str | None = None) -> list[int]:
        """Ids up to where the first assistant turn begins."""
        if self.template:
            system_text = f"{system}\n\n" if system else ""
            text = (
                self.template.prefix
                + system_text
                + self.template.user.replace("{content}", user)
                + self.template.assistant
            )
            return self.tokenizer(text).input_ids
        return self.tokenizer(self._render(self._messages(user, system)), add_special_tokens=False).input_ids

    def next_turn(self, previous_ids: list[int], user: str) -> list[int]:
        """Ids between the end of an assistant turn and the start of the next one.

        The end-of-turn token is left out if the completion already produced it.
        """
        if self.template:
            text = self.template.close + self.template.user.replace("{content}", user) + self.template.assistant
        else:
            rendered = self._render(
                [*self._messages(".", None), {"role": "assistant", "content": _MARK}, {"role": "user", "content": user}]
            )
            if _MARK not in rendered:
                raise DataError("target.template: the chat template drops assistant turns; use prompts.max_turns: 1")
            text = rendered.split(_MARK, 1)[1]
        ids = self.tokenizer(text, add_special_tokens=False).input_ids
        return ids[1:] if previous_ids and ids and ids[0] == previous_ids[-1] else ids

    def _messages(self, user: str, system: str | None) -> list[dict[str, str]]:
        return ([{"role": "system", "content": system}] if system else []) + [{"role": "user", "content": user}]

    def _render(self, messages: list[dict[str, str]]) -> str:
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except TemplateError as error:  # such as "system role not supported"
            raise DataError(f"target.template: the tokenizer's chat template refuses a conversation: {error}") from None
