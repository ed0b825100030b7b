"""What a draft inherits from its target and its data. Licences are data here, never prose in a template.

A draft is trained on its target's outputs and hidden states and starts from rows of its head, so the target's licence
is the least that holds for it. None of this is legal advice, and the card says whose decision an override was.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from draftsmith.core.errors import RecipeError
from draftsmith.data.sources import HUB, HubSource
from draftsmith.targets.embedded import EMBEDDED


@dataclass(frozen=True)
class Licence:
    """`id` is Hugging Face's identifier; `other` needs `name` and `link`. `notices` stand on the card word by word."""

    id: str
    title: str
    name: str = ""
    link: str = ""
    commercial: bool = True
    notices: tuple[str, ...] = ()


MINIMAX = Licence(
    "other",
    "MiniMax-M2.7 non-commercial licence",
    "minimax-m2.7-non-commercial",
    "https://huggingface.co/MiniMaxAI/MiniMax-M2.7/blob/main/LICENSE",
    commercial=False,
    notices=(
        "Built with MiniMax M2.7",
        "Non-commercial use only. Commercial use needs prior written authorisation by MiniMax: write to "
        'api@minimax.io, subject "M2.7 licensing"; products so authorised must prominently display '
        '"Built with MiniMax M2.7".',
    ),
)
GEMMA = Licence(
    "gemma",
    "Gemma Terms of Use",
    link="https://ai.google.dev/gemma/terms",
    notices=(
        "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms.",
        "Use is restricted by the Gemma Prohibited Use Policy, ai.google.dev/gemma/prohibited_use_policy; whoever "
        "passes this draft on passes these terms on.",
    ),
)
APACHE = Licence("apache-2.0", "Apache License 2.0", link="https://www.apache.org/licenses/LICENSE-2.0")
MIT = Licence("mit", "MIT License", link="https://opensource.org/license/mit")


def _llama(version: str, identifier: str) -> Licence:
    name = "Meta Llama 3" if version == "3" else f"Llama {version}"
    return Licence(
        identifier,
        f"{name} Community License",
        link=f"https://www.llama.com/llama{version.replace('.', '_')}/license",
        notices=(
            "Built with Meta Llama 3" if version == "3" else "Built with Llama",
            f"{name} is licensed under the {name} Community License, Copyright (c) Meta Platforms, Inc. All Rights "
            "Reserved. A model made with it carries a name that begins with Llama.",
        ),
    )


# Patterns on the target's name, hub owner included; the first that fits holds. What is not here is unknown: releases of
# one family differ, so nothing is guessed from the owner alone.
TARGETS: tuple[tuple[str, Licence], ...] = (
    (r"MiniMaxAI/MiniMax-M2\.7", MINIMAX),
    (r"google/gemma-(2b|7b|1\.1|2|3|3n)(-.*)?", GEMMA),
    (r"meta-llama/(Meta-)?Llama-3\.1-.*", _llama("3.1", "llama3.1")),
    (r"meta-llama/Llama-3\.2-.*", _llama("3.2", "llama3.2")),
    (r"meta-llama/Llama-3\.3-.*", _llama("3.3", "llama3.3")),
    (r"meta-llama/Meta-Llama-3-.*", _llama("3", "llama3")),
    (r"meta-llama/Llama-4-.*", _llama("4", "llama4")),
    (r"HuggingFaceTB/SmolLM[23]?-.*", APACHE),
    (r"Qwen/Qwen3-.*", APACHE),
    (r"openai/gpt-oss-.*", APACHE),
    (r"mistralai/(Mistral-7B|Mistral-Nemo|Mistral-Small-(24B|3\.[12])|Mixtral-8x)[-\w.]*", APACHE),
    (r"deepseek-ai/DeepSeek-(R1|R1-0528|V3\.1.*|V3\.2.*)", MIT),
    (r"microsoft/phi-4.*", MIT),
    (r"zai-org/GLM-4\.[5-7].*", MIT),
)
# Of what is bundled and of its parts, by the source's name.
DATA = {
    "bundled": "apache-2.0",
    "gpteacher-roleplay": "mit",
    "gsm8k-train": "mit",
    "gsm8k-test": "mit",
    "ultrachat-eval": "mit",
}
UNSTATED = "not stated"


def hub_name(target: str) -> str:
    """The hub's name of a target that goes by a name of our own."""
    return EMBEDDED[target].hub_name if target in EMBEDDED else target


def licence_of(target: str, override: str | None = None) -> Licence:
    """The licence that a draft of this target inherits; raises `RecipeError` where that is not known.

    An override names another identifier; the notices of a known target stay, for its terms still hold, and so do those
    that belong to the identifier itself. Terms that forbid commercial use cannot be overridden away.
    """
    name = hub_name(target)
    known = next((licence for pattern, licence in TARGETS if re.fullmatch(pattern, name, re.IGNORECASE)), None)
    if known is not None and override in (None, known.id):
        return known
    if known is not None and not known.commercial:
        raise RecipeError(
            f"card.licence: {override!r} given; {name} is under the {known.title}, which a draft inherits: leave it out"
        )
    if override:
        title = f"{override}, as decided by the draft's author"
        if known is not None:
            return replace(known, id=override, title=f"{title}; the target's own is the {known.title}")
        of_id = next((licence for _, licence in TARGETS if licence.id == override != "other"), None)
        if of_id is not None:
            return replace(of_id, title=f"{of_id.title}, as decided by the draft's author")
        return Licence(override, title, name="see-the-card" if override == "other" else "", link="README.md")
    raise RecipeError(
        f"card.licence: the licence of {target!r} is not known here, so there is no card; read its terms, then set "
        "card.licence to what they allow (a Hugging Face identifier, such as apache-2.0 or other)"
    )


def data_licences(sources: Sequence[str], told: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """(source, hub data set or "", licence) of every source of prompts; `told` is the recipe's card.data_licences."""
    rows = []
    for source in dict.fromkeys(sources):
        hub = HUB.get(source, HubSource("", None, licence=DATA.get(source, UNSTATED)))
        rows.append((source, hub.path, told.get(source) or hub.licence))
    return rows
