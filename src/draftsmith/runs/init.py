"""`draftsmith init MODEL`: a commented recipe for any model, from what its own files say.

What decides the outcome is written out with the reason beside it; everything else keeps its default. What the model's
files do not tell is assumed, marked `assumed` in the file, and listed on the screen.
"""

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml

from draftsmith.core.errors import RecipeError, TargetError
from draftsmith.core.files import JsonObject, write_atomic
from draftsmith.core.recipe import Recipe, ServeRecipe
from draftsmith.core.recipe_file import parse_recipe
from draftsmith.core.taps import default_taps
from draftsmith.data.licences import licence_of
from draftsmith.drafts import METHODS
from draftsmith.hardware.cost_model import RooflineCosts
from draftsmith.hardware.presets import CPU, Machine, preset
from draftsmith.hardware.sizes import TargetSize
from draftsmith.runs.plan import GPU_FLOPS_S, ROOM, Plan, Sizes, plan, size
from draftsmith.targets.configs import target_config
from draftsmith.targets.parts import context_of, load_tokenizer, resolve_model

MEASURED_WIDTH = 640
"""Hidden size up to which drafts were trained at 0.004 (docs/ablations.md); wider ones take what peers do with Muon."""


@dataclass
class Facts:
    """What a model's files tell; `unknown` is what they do not."""

    model: str
    config: Any
    has_template: bool
    sampling: dict[str, float]
    licence: str | None
    unknown: list[str] = field(default_factory=list)

    @property
    def text(self) -> Any:
        return self.config.get_text_config()


def read_facts(model: str, revision: str | None, trust_remote_code: bool) -> Facts:
    config = target_config(model, revision, trust_remote_code)
    tokenizer = load_tokenizer(model, revision, trust_remote_code)
    facts = Facts(model, config, bool(tokenizer.chat_template), {}, None)
    generation = _generation_config(model, revision)
    if generation.get("do_sample") is False:
        facts.sampling = {"temperature": 0.0}
    elif "temperature" in generation:
        facts.sampling = {k: generation[k] for k in ("temperature", "top_p", "top_k") if generation.get(k) is not None}
    else:
        facts.unknown.append("the sampling settings that the model is served with: regenerate.temperature 1.0 assumed")
    try:
        facts.licence = licence_of(model).title
    except RecipeError:
        facts.unknown.append("the target's licence, which a draft inherits: read it, then set card.licence")
    if not facts.has_template:
        facts.unknown.append("the prompt format, as the tokenizer has no chat template: target.template is a guess")
    return facts


def _generation_config(model: str, revision: str | None) -> JsonObject:
    """The model's own defaults for sampling; empty where it names none."""
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(resolve_model(model), revision=revision or "main").to_diff_dict()
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):  # none, or no object
        return {}


def this_machine() -> Machine:
    """The memory that is here, with the rates of a named machine of its kind: enough to choose sizes by."""
    if torch.cuda.is_available():
        memory = float(torch.cuda.get_device_properties(0).total_memory)
        return replace(preset("h100-1"), name="this machine", gpus=torch.cuda.device_count(), memory_bytes=memory)
    return replace(CPU, name="this machine", memory_bytes=float(psutil.virtual_memory().total))


def taps_for(layers: int) -> list[int] | None:
    """None where the engines' default holds; else a low, a middle and a high layer of a shallow target."""
    try:
        default_taps(layers)
    except TargetError:
        return sorted({min(1, layers - 1), layers // 2, layers - 1})
    return None


def planned(recipe: Recipe, facts: Facts, machine: Machine) -> Plan:
    method = METHODS[recipe.draft.method]
    draft = method.config(recipe.draft, facts.text, facts.text.num_hidden_layers, recipe.vocab.size)
    target = TargetSize.of(facts.config, recipe.target.dtype)
    return plan(Sizes(recipe, machine, target, draft), RooflineCosts(machine, target, draft))


def _values(facts: Facts, data: Path | None, gpu: bool, revision: str | None, trusted: bool) -> JsonObject:
    """The recipe as plain values, the target in this process."""
    text = facts.text
    context = context_of(text)
    answer = min(1024 if gpu else 256, context // 2)
    target: JsonObject = {"model": facts.model, "dtype": "bf16" if gpu else "fp32"}
    if revision:
        target["revision"] = revision
    if trusted:
        target["trust_remote_code"] = True
    if not facts.has_template:
        target["template"] = {
            "user": "### Instruction:\n{content}\n\n",
            "assistant": "### Response:\n",
            "close": "\n\n",
            "stop": ["###"],
        }
    prompts: JsonObject = {"sources": [{"name": str(data) if data else "bundled-train"}]}
    if data is None:
        prompts["evaluation"] = [{"name": "bundled-dev"}]
    draft = {} if (taps := taps_for(text.num_hidden_layers)) is None else {"taps": taps}
    train = {
        "epochs": 3,
        "pack_tokens": 4096 if gpu else 1024,
        "max_document_tokens": min(4096 if gpu else 512, context),
        "ttt_steps": 7 if gpu else 3,
        **({"objective": "lk_lambda"} if gpu else {"dtype": "fp32"}),
        "optimizer": "muon",
        "learning_rate": 0.004 if text.hidden_size <= MEASURED_WIDTH else 0.001,
        "head_rate": 0.3,
        "capture": "online" if gpu else "offline",
    }
    regenerate = {
        **({"temperature": 1.0} | facts.sampling),
        "max_new_tokens": answer,
        "max_prompt_tokens": min(2048 if gpu else 320, context - answer),
        **({} if gpu else {"max_tokens": 100_000, "stop_loops": True}),
    }
    evaluate: JsonObject = {} if gpu else {"prompts": 60}
    if "temperature" in facts.sampling:  # greedy, and as the model is served
        evaluate["temperatures"] = sorted({0.0, float(facts.sampling["temperature"])})
        evaluate |= {key: value for key, value in facts.sampling.items() if key != "temperature"}
    return {
        "name": re.sub(r"[^\w.-]+", "-", facts.model.rstrip("/").split("/")[-1]).lower() + "-eagle3",
        "target": target,
        "prompts": prompts,
        "regenerate": regenerate,
        "vocab": {"size": min(32000 if gpu else 8192, text.vocab_size)},
        "draft": draft,
        "train": train,
        "evaluate": evaluate,
    }


def choose(
    facts: Facts, machine: Machine, data: Path | None, revision: str | None, trusted: bool
) -> tuple[JsonObject, Plan]:
    """Values and plan; on servers where target and trainer do not fit on one device together."""
    values = _values(facts, data, machine.flops_s > GPU_FLOPS_S, revision, trusted)
    needs = planned(parse_recipe(values, "init"), facts, machine)
    if max(needs.numbers["target"], needs.numbers["trainer"]) < ROOM * machine.memory_bytes:
        return values, needs
    weights = needs.numbers["target weights"]
    parallel = 1
    while parallel < machine.gpus and weights / parallel > 0.7 * machine.memory_bytes:
        parallel *= 2
    values["target"] = {"engine": ServeRecipe().engine, **values["target"], "dtype": "bf16"}
    values["server"] = {"urls": ["http://127.0.0.1:8000"]}
    values["serve"] = {"tensor_parallel": parallel}
    facts.unknown.append("where the target's servers are: server.urls, one per replica (docs/large-targets.md)")
    if weights / parallel > ROOM * machine.memory_bytes:
        facts.unknown.append(
            f"a machine that holds the target: {size(weights)} of weights, {size(machine.memory_bytes)} x "
            f"{machine.gpus} on {machine.name}"
        )
    return values, planned(parse_recipe(values, "init"), facts, machine)


def render(values: JsonObject, facts: Facts, needs: Plan, machine: Machine) -> str:
    """The recipe's text: the values, and beside them why."""
    text, layers = facts.text, facts.text.num_hidden_layers
    parts = {what: line for rows in needs.sections.values() for what, line in rows}
    reasons = {
        "model": f"{parts['target weights']}; {layers} layers, hidden size {text.hidden_size}",
        "engine": "target and trainer do not fit on one device together: the target answers from servers",
        "dtype": "as it will be served" if values["target"]["dtype"] == "bf16" else "many CPUs are slow in bf16",
        "template": "assumed: this base model has no chat template; what answers best is worth a look at the report",
        "urls": "one per replica",
        "tensor_parallel": f"GPUs that share {parts['target weights'].split(',')[-1].strip()}",
        "sources": "what your users ask"
        if values["prompts"].get("evaluation") is None
        else "yours are better: what your users ask; any file or folder of prompts or conversations",
        "evaluation": "measured on these, never trained on",
        "temperature": "of its generation_config.json" if facts.sampling else "assumed: none in generation_config.json",
        "temperatures": "greedy, and as it is served",
        "max_new_tokens": "longest answer",
        "max_tokens": "enough for a first draft; more data is the surest way to a longer accept length",
        "size": f"of {text.vocab_size:,} tokens; what is outside can never be drafted (the report has the coverage)",
        "taps": f"the default needs more than {layers} layers",
        "pack_tokens": parts["trainer"],
        "objective": "drafts are served sampled, too",
        "learning_rate": "measured up to this width"
        if text.hidden_size <= MEASURED_WIDTH
        else "not measured this wide: halve or double it and compare held-out tau",
        "capture": f"hidden states go to disk once, {parts['all of them'].split(' on disk')[0]}"
        if values["train"]["capture"] == "offline"
        else "hidden states never touch the disk",
        "prompts": "of the evaluation set, for a first look; leave out for all",
    }
    lines = [f"# A draft for {facts.model}, its sizes chosen by `draftsmith init` for {machine.name}."]
    for line in yaml.safe_dump({k: v for k, v in values.items() if v}, sort_keys=False, width=120).splitlines():
        key = line.strip().removeprefix("- ").split(":")[0]
        top_level = not line.startswith((" ", "-"))
        if key in reasons and not (top_level and key == "prompts"):
            line = f"{line} # {reasons.pop(key)}"
        lines.append(line)
    taps = values["draft"].get("taps") or list(default_taps(layers))
    lines.append(f"# draft: taps {taps} and the target's own widths; draft.* changes them")
    recipe = parse_recipe(values, "init").draft
    if note := METHODS[recipe.method].config_note(recipe, text):
        lines[-1] = f"# draft: taps {taps}; {note.removeprefix('draft: ')}"
    if facts.licence:
        lines.append(f"# card: the draft inherits the target's licence, {facts.licence}")
    needed = (
        [] if facts.licence else ["licence: other # unknown here: read the target's; no card is written without it"]
    )
    if Path(facts.model).is_dir():
        needed.append("base_model: owner/name # of this directory, for the card's link")
    if needed:
        lines += ["# card:", *(f"#   {line}" for line in needed)]
    return "\n".join(lines) + "\n"


def init(
    model: str,
    data: Path | None,
    out: Path | None,
    hardware: str | None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[Path, list[str]]:
    """Write the recipe; returns its path and what could not be known. Nothing that exists is overwritten."""
    if data is not None and not data.exists():
        raise RecipeError(f"--data: {data} is no file; give a file or folder of prompts or conversations")
    facts = read_facts(model, revision, trust_remote_code)
    machine = preset(hardware) if hardware else this_machine()
    values, needs = choose(facts, machine, data, revision, trust_remote_code)
    path = out or Path(f"{values['name']}.yaml")
    if path.exists():
        raise RecipeError(f"--out: {path} exists; delete it or give another --out")
    text = render(values, facts, needs, machine)
    parse_recipe(yaml.safe_load(text), str(path))
    write_atomic(path, text)
    return path, facts.unknown
