"""Conversations to token ids, turn by turn, as a server's chat endpoint would be asked for each turn.

What the target wrote is kept as the ids that it generated. The history before the next answer is rendered anew by the
chat template, which is what a server does: reasoning of past turns disappears where the template drops it, and a past
turn ends with the template's own token, whatever ended the generation.
"""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from draftsmith.core.errors import DataError
from draftsmith.core.files import JsonObject
from draftsmith.core.recipe import Recipe, Template
from draftsmith.data.rendering import Renderer
from draftsmith.decoding.generation import Generation

# What ends a model's reasoning; clients send back what follows it. DeepSeek-R1, Qwen3, MiniMax-M2, GLM and others;
# Mistral's Magistral; gpt-oss' final channel; Seed-OSS.
REASONING_ENDS = ("</think>", "[/THINK]", "<|channel|>final<|message|>", "</seed:think>")

RENDERER = Renderer()

TurnLeftOut = Literal["too long", "refused by the template"]


class Rendered(list[int]):
    """Ids of a conversation up to where the next answer begins, and the messages that they render."""

    def __init__(self, ids: Sequence[int], messages: Sequence[JsonObject], tools: list[Any] | None = None):
        super().__init__(ids)
        self.messages, self.tools = list(messages), tools


class ChatFormat:
    """Renders the ids that stand before each answer.

    With a recipe template the texts are the recipe's; otherwise they come from the tokenizer's own chat template, which
    is given `options` (`target.template_options`) and a prompt's tools. `rows`: of the target's embedding.
    """

    def __init__(
        self,
        tokenizer: Any,
        template: Template | None,
        options: Mapping[str, Any] | None = None,
        rows: int | None = None,
    ):
        if template is None and not tokenizer.chat_template:
            raise DataError(
                "target.template: the tokenizer has no chat template; give one, for example "
                '{user: "User: {content}\\n", assistant: "Assistant:", stop: ["\\nUser:"]}'
            )
        self.tokenizer, self.template, self.options, self.rows = tokenizer, template, dict(options or {}), rows
        self.stop: tuple[str, ...] = template.stop if template else ()

    @classmethod
    def of(cls, recipe: Recipe, target: Any) -> "ChatFormat":
        """The format of a run: its target's tokenizer, and what the recipe says of the template."""
        return cls(target.tokenizer, recipe.target.template, recipe.target.template_options, target.identity.vocab_size)

    def first_turn(self, user: str, system: str | None = None, tools: list[Any] | None = None) -> Rendered:
        """Ids up to where the first answer begins; raises `DataError` where the template refuses the conversation."""
        messages = ([{"role": "system", "content": system}] if system else []) + [{"role": "user", "content": user}]
        if self.template:
            system_text = f"{system}\n\n" if system else ""
            turn = self.template.user.replace("{content}", user) + self.template.assistant
            return self._known(self.tokenizer(self.template.prefix + system_text + turn).input_ids, messages)
        return self._render(messages, tools)

    def next_turn(self, asked: list[int], answer: Generation, user: str, longest: int) -> Rendered | TurnLeftOut:
        """Ids before the next answer, after `answer` to what was `asked` (an earlier turn's `Rendered`) and the user's
        reply to it; else why there are none (they may be `longest` at most)."""
        assert isinstance(asked, Rendered)
        messages = [*asked.messages, self._as_message(answer), {"role": "user", "content": user}]
        try:
            if self.template:  # texts joined by hand: nothing is tokenised twice
                text = self.template.close + self.template.user.replace("{content}", user) + self.template.assistant
                ids = self.tokenizer(text, add_special_tokens=False).input_ids
                following = self._known([*asked, *answer.ids, *ids], messages)
            else:
                following = self._render(messages, asked.tools)
        except DataError:
            return "refused by the template"
        return following if len(following) <= longest else "too long"

    def _as_message(self, answer: Generation) -> JsonObject:
        """The answer as a client sends it back: without its end token, the reasoning apart."""
        ids = answer.ids[:-1] if answer.finish_reason == "eos" else answer.ids
        start = self._after_reasoning(ids)
        message = {"role": "assistant", "content": self.tokenizer.decode(ids[start:], skip_special_tokens=True)}
        if start:
            message["content"] = message["content"].strip()
            reasoning = self.tokenizer.decode(ids[:start], skip_special_tokens=False)
            for mark in ("<think>", "[THINK]", *REASONING_ENDS):
                reasoning = reasoning.replace(mark, "")
            message["reasoning_content"] = reasoning.strip()
        return message

    def _after_reasoning(self, ids: Sequence[int]) -> int:
        """Index of the first token after the last end of reasoning; 0 where there is none."""

        def ends_before(index: int) -> int:
            text = self.tokenizer.decode(ids[:index], skip_special_tokens=False)
            return sum(text.count(mark) for mark in REASONING_ENDS)

        every = ends_before(len(ids))
        return bisect_left(range(len(ids)), every, key=ends_before) if every else 0

    def _render(self, messages: Sequence[JsonObject], tools: list[Any] | None) -> Rendered:
        try:
            text = self._text(messages, tools)
            ids = self.tokenizer(text, add_special_tokens=False).input_ids
        except DataError as error:
            raise DataError(f"target.template: the tokenizer's chat template {error}") from None
        except Exception as error:  # a tokenizer's own code raises what it likes, and none encodes half a pair
            told = f"refuses a conversation: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise DataError(f"target.template: the tokenizer's chat template {told}") from None
        return self._known(ids, messages, tools)

    def _text(self, messages: Sequence[JsonObject], tools: list[Any] | None) -> str:
        """What `apply_chat_template` makes of it; by that method itself where a model's own code has another one."""
        from transformers import PreTrainedTokenizerBase

        if type(self.tokenizer).apply_chat_template is not PreTrainedTokenizerBase.apply_chat_template:
            return self.tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=True, **self.options
            )
        request = {
            **self.tokenizer.special_tokens_map,
            **self.options,
            "conversations": [list(messages)],
            "tools": tools,
            "chat_template": self.tokenizer.get_chat_template(None, tools),
            "add_generation_prompt": True,
        }
        return RENDERER.render(request)

    def _known(self, ids: list[int], messages: Sequence[JsonObject], tools: list[Any] | None = None) -> Rendered:
        """Some tokenizers have tokens (images) for which the model has no row: a text that holds one is refused."""
        beyond = next((i for i in ids if self.rows is not None and i >= self.rows), None)
        if beyond is not None:
            token = self.tokenizer.convert_ids_to_tokens(beyond)
            raise DataError(f"the text holds the token {token} ({beyond}), and the target has {self.rows} rows")
        return Rendered(ids, messages, tools)
