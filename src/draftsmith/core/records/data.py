"""Prompts and completions."""

from typing import Literal

from draftsmith.core.files import JsonObject
from draftsmith.core.records.base import Record
from draftsmith.core.records.run import TargetIdentity


class Prompt(Record):
    """A row of prompts/prompts.jsonl and evaluation.jsonl."""

    id: str
    category: str
    source: str
    messages: list[dict[str, str]]
    """A system turn, if any, and the user turns that the target will answer."""
    tools: list[JsonObject] = []
    """Tools to offer in the chat template."""

    @property
    def users(self) -> list[str]:
        return [message["content"] for message in self.messages if message["role"] == "user"]

    @property
    def system(self) -> str | None:
        return next((message["content"] for message in self.messages if message["role"] == "system"), None)


class PromptsSummary(Record):
    """prompts/summary.json"""

    prompts: int
    evaluation_prompts: int
    duplicates_dropped: int
    contaminated_dropped: int
    """Training prompts that occur in the evaluation set."""
    bad_rows_skipped: int
    rows_without_prompt: int
    left_out: dict[str, int]
    """Rows that lost something, or all, by reason."""
    by_category: dict[str, int]
    by_source: dict[str, int]


class EvaluationPrompts(Record):
    """sets/NAME-KEY.json: a named evaluation set as it was read, once for all engines."""

    name: str
    source: str
    """Data set, split and revision, or the file's name."""
    licence: str
    prompts: list[Prompt]
    trained_on: int
    """Prompts left out because training prompts begin alike."""
    left_out: dict[str, int]
    """Rows that lost something, or all, by reason."""


class Completion(Record):
    """A row of completions/NNNNN.jsonl: a conversation as token ids.

    One whose turns are not prefixes of each other has several rows; the first one has the prompt's id.
    """

    id: str
    category: str = ""
    source: str = ""
    ids: list[int]
    spans: list[tuple[int, int]]
    """Half-open ranges that the target wrote and that carry the loss."""
    finish_reason: Literal["eos", "stop", "length", "loop", ""] = ""
    sampling: tuple[float, float, int] = (0.0, 1.0, 0)
    """Temperature (0 is greedy), top-p, top-k."""
    document: int = 0
    """Number of the row within its conversation."""
    turns_left_out: dict[str, int] = {}
    """User turns that were never asked, by reason; in the conversation's last row."""

    @property
    def loss_tokens(self) -> list[int]:
        return [token for start, end in self.spans for token in self.ids[start:end]]


class CompletionsSummary(Record):
    """completions/summary.json"""

    completion_tokens: int
    completions: int
    finish_reasons: dict[str, int]
    empty: int
    prompts_too_long: int
    prompts_refused: int
    """By the chat template."""
    tokens_by_category: dict[str, int]
    turns_left_out: dict[str, int] = {}
    """User turns that were never asked, by reason, of the conversations that were begun."""
    greedy_tokens: int | None = None
    """Of the completion tokens, those written at temperature 0; null where an earlier version did not count them."""


class Timing(Record):
    """completions/timing.json: what the last sitting wrote itself."""

    completion_tokens: int
    seconds: float
    tokens_per_s: float


class IdentityCheck(Record):
    """completions/identity.json: who wrote them, and who they may be trained and measured with."""

    target: TargetIdentity
    weights_hash: str | None
    """Of the files that the target was loaded from; null where servers loaded them."""
    logprobs: list[float]
    """Of a probe text's tokens after the first; every later server, and every later target here, has to give the
    same."""


class Coverage(Record):
    """vocab/coverage.json: share of loss tokens inside draft vocabularies of several sizes."""

    name: str
    """Content address of the chosen vocabulary."""
    sizes: list[int]
    coverage: dict[str, list[float]]
    """By category, `all` first; one share for each size."""
    distinct_tokens: int
    loss_tokens: int
    chosen_size: int
    chosen: dict[str, float]
