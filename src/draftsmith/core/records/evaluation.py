"""What decoding with a draft measures."""

from draftsmith.core.files import JsonObject
from draftsmith.core.records.base import Decodes, Record
from draftsmith.core.records.run import Provenance
from draftsmith.core.shape import DraftSampling, Shape
from draftsmith.core.tables import by_reason

CERTAIN = 99
"""Two digits that stand for 1."""


class Tau(Record):
    tau: float | None
    low: float | None = None
    """95 % percentile interval over prompts; null under ten prompts."""
    high: float | None = None
    prompts: int
    steps: int

    def __str__(self) -> str:
        """`2.10 [2.02, 2.19]`; without the interval where there is none."""
        if self.tau is None:
            return "-"
        return f"{self.tau:.2f}" + ("" if self.low is None else f" [{self.low:.2f}, {self.high:.2f}]")

    @property
    def short(self) -> str:
        return "-" if self.tau is None else f"{self.tau:.2f}"


class PromptCounts(Record):
    """Verification steps of one prompt; what a loop or the end cuts short is apart. Lists are by depth."""

    id: str
    category: str
    tokens: int
    looping_tokens: int
    steps: int = 0
    accepted: int = 0
    reached: list[int] = []
    """Steps in which the depth could be accepted."""
    accepted_at: list[int] = []
    looping_steps: int = 0
    looping_accepted: int = 0
    context: int = 0
    """Tokens of prompt and answer together, in the longest turn."""
    by_context: dict[int, tuple[int, int]] = {}
    """(accepted, steps) of the steps with at most so many tokens before them and more than half as many; 512 has all
    shorter ones. Empty where the engine tells no order."""


class Acceptance(Record):
    """Accept length of one shape at one temperature, drafts taken in one way."""

    shape: Shape
    temperature: float
    drafts: DraftSampling = "greedy"
    all: Tau
    by_category: dict[str, Tau]
    macro: float | None = None
    """Mean of the categories' tau, each as heavy as any other."""
    by_context: dict[int, Tau] = {}
    """By tokens before the step, as in `prompts`."""
    longest_context: int = 0
    """Tokens of the longest prompt with its answer: nothing is known beyond."""
    acceptance_by_depth: list[float | None]
    """Share accepted of the steps that reached the depth."""
    looping_share: float
    """Of the tokens; they count in `tau_with_loops` alone."""
    tau_with_loops: float
    tokens: int
    prompts: list[PromptCounts]
    oracle: Tau | None = None
    """Of chains that always propose the target's first choice; at temperatures above 0 with greedily taken drafts,
    where the engine tells."""
    share_of_oracle: float | None = None
    turns: int = 0
    """User turns that were asked."""
    turns_left_out: dict[str, int] = {}
    """Others of the same prompts, by reason."""

    @property
    def unasked(self) -> str:
        """`60 of 80 turns asked: 20 too long`; empty where all were."""
        if not self.turns_left_out:
            return ""
        every = self.turns + sum(self.turns_left_out.values())
        return f"{self.turns:,} of {every:,} turns asked: {by_reason(self.turns_left_out)}"

    @property
    def how(self) -> str:
        """`T=1, sampled drafts`"""
        return f"T={self.temperature:g}" + (", sampled drafts" if self.drafts == "sampled" else "")

    @property
    def setting(self) -> str:
        """`3/1/4, T=1, sampled drafts`"""
        return f"{self.shape}, {self.how}"


class Difference(Record):
    """Where a drafted greedy output parts from the plain one."""

    id: str
    shape: Shape
    token: int
    plain: int | None = None
    """The token there; null where one of the texts ended."""
    drafted: int | None = None
    logit_gap: float | None = None
    """How close the target holds the two tokens."""


class Lossless(Record):
    """Greedy output against plain decoding, token by token."""

    dtype: str
    prompts: int
    tokens_per_prompt: int
    tokens: int
    shapes: tuple[Shape, ...]
    differences: list[Difference]


class TimedGroup(Record):
    """Prompts that were decoded at once."""

    tokens: int
    seconds: float
    accepted: int = 0
    steps: int = 0
    outputs: list[list[int]] = []


class Speed(Record):
    """Greedy decoding of the same prompts with and without the draft."""

    shape: Shape
    batch: int
    prompts: int
    tokens: int
    plain_tokens_per_s: float
    drafted_tokens_per_s: float
    speedup: float
    """Median over prompts."""
    tau: float | None
    dtype: str
    differences: list[Difference] = []


class Profile(Record):
    """Ranks of the target's own tokens among the draft's choices, teacher-forced."""

    temperature: float = 0.0
    """Of the target's text."""

    prompts: int
    positions: int
    table: list[list[float]]
    """table[d][r]: share of choice r + 1 at depth d + 1 where the first choices before it were right."""
    walks: list[list[str]]
    """walks[prompt][position]: one digit per depth, 0 for none of the first nine choices."""
    chances: list[list[str]] = []
    """Above temperature 0. chances[prompt][position]: two digits per depth, in 99ths the chance that the token was a
    sampled draft's: min(1, q / p)."""


class EvaluationSettings(Record):
    engine: Decodes
    draft: str | None = None
    """Digest of the exported weights; null where there were none."""
    prompts: int
    prompts_available: int
    max_new_tokens: int
    top_p: float
    top_k: int
    target: str
    dtype: str
    threads: int | None = None
    window: int | None = None
    """Tokens that the target can read at once."""
    speed_gpus: int | None = None
    """What speed was measured on, where there are GPUs; null where nobody tells."""

    @property
    def filters(self) -> str:
        """`, top-p 0.95, top-k 40` of what was drawn; empty where neither was on."""
        top_p = f", top-p {self.top_p:g}" if self.top_p < 1 else ""
        return top_p + (f", top-k {self.top_k}" if self.top_k else "")


class PlainReference(Record):
    """Of the target alone: what drafted outputs and times are compared with."""

    outputs: list[list[int]]
    timed: dict[int, list[TimedGroup]]
    """By requests at once."""


class MeasuredSet(Record):
    """A named evaluation set."""

    name: str
    source: str
    licence: str
    digest: str
    """Of its prompts: the same for the same ones."""
    prompts: int
    prompts_available: int
    """Without those that were trained on."""
    trained_on: int
    """Prompts left out because training prompts begin alike."""
    acceptance: list[Acceptance]


class Measured(Record):
    """Accept lengths on the run's own evaluation prompts and on named sets."""

    acceptance: list[Acceptance]
    sets: list[MeasuredSet] = []

    @property
    def entries(self) -> list[tuple[str, Acceptance]]:
        """(name of the set, "" for the run's own prompts; what was accepted)"""
        return [("", e) for e in self.acceptance] + [(s.name, e) for s in self.sets for e in s.acceptance]


class Results(Measured):
    """evaluate/results.json, evaluate-ENGINE/results.json"""

    created_with: Provenance
    settings: EvaluationSettings
    left_out: list[float] = []
    """Temperatures at which the engine does not draw, so that nothing was measured."""
    lossless: Lossless | None = None
    speed: list[Speed] = []
    profile: Profile | None = None
    """At temperature 0."""
    sampled_profile: Profile | None = None
    """At the highest temperature."""

    @property
    def partial(self) -> bool:
        return self.settings.prompts < self.settings.prompts_available

    @property
    def timed_on(self) -> str:
        if self.settings.engine != "embedded" and self.settings.speed_gpus is None:
            return "servers whose hardware is not recorded"
        return str(self.created_with.hardware.first(self.settings.speed_gpus))


class PairedDifference(Record):
    """tau of a draft less tau of the first one, on the prompts that both have."""

    difference: float | None
    low: float | None = None
    high: float | None = None
    prompts: int

    def __str__(self) -> str:
        if self.difference is None:
            return "-"
        interval = "" if self.low is None else f" [{self.low:+.2f}, {self.high:+.2f}]"
        return f"{self.difference:+.2f}{interval} against the first on {self.prompts} prompts"


class ComparedDraft(Measured):
    draft: str
    parameters: int
    bytes: int
    coverage: float | None
    """Share of the target's own tokens that the draft can propose."""
    against_first: list[PairedDifference] = []
    """For every entry of `acceptance`, then of the sets; none for the first draft."""
    profile: Profile | None
    config: JsonObject
    """The method's own configuration."""
    predicted: dict[str, float] = {}
    """Speed-up by machine."""


class Comparison(Record):
    """compare/compare.json"""

    created_with: Provenance
    drafts: list[ComparedDraft]
