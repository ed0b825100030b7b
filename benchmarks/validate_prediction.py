"""Predicted against measured speed-up on this machine.

    python benchmarks/validate_prediction.py recipes/gemma3-270m-cpu.yaml --engine embedded
    python benchmarks/validate_prediction.py recipes/gemma3-270m-cpu.yaml --engine vllm [--serve.program ...]
    python benchmarks/validate_prediction.py recipes/gemma3-270m-cpu.yaml --summary

Needs a finished run of the recipe. The prediction sees a probe and the draft's ranks on the target's own text; the
measurement decodes the same prompts, plain and drafted in turns. On vLLM one setting (3/1/4 at batch 1) calibrates what
drafting costs there and is left out of the figures. Results go to benchmarks/results/prediction-validation.json.
"""

import argparse
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from draftsmith.cli import parse, quiet_libraries
from draftsmith.core import files
from draftsmith.core.progress import Meter
from draftsmith.core.records.machine import Probe
from draftsmith.core.shape import Shape
from draftsmith.decoding.generation import Generation
from draftsmith.decoding.sampling import Sampling
from draftsmith.decoding.speculate import Decoder
from draftsmith.decoding.stopping import Ends
from draftsmith.drafts.directories import ReadyDraft, ready_draft
from draftsmith.engines import ENGINES
from draftsmith.evaluation.evaluate import Evaluation
from draftsmith.evaluation.profile import walks_of
from draftsmith.hardware.accept_length import MeasuredProfile
from draftsmith.hardware.cost_model import MeasuredCosts, predict
from draftsmith.runs.probing import REFERENCE, embedded_times, server_times
from draftsmith.runs.run import Run
from draftsmith.targets.base import Target

OUT = Path(__file__).parent / "results" / "prediction-validation.json"
EMBEDDED = ("1/1/2", "2/1/3", "3/1/4", "5/1/6", "7/1/8", "2/2/4", "3/4/8", "5/4/8", "3/4/16", "5/4/32", "5/8/64")
CHAINS = ("1/1/2", "3/1/4", "5/1/6", "7/1/8")
BATCHES = (1, 4, 16)


def row(engine: str, shape: Shape, batch: int, measured: dict, costs: MeasuredCosts, accept: MeasuredProfile) -> dict:
    told = predict(costs, shape, accept.tau(shape), batch, 128)
    real = measured["drafted_tokens_per_s"] / measured["plain_tokens_per_s"]
    line = {"engine": engine, "shape": str(shape), "batch": batch, "predicted": told.speedup, "measured": real}
    line |= {"tau_predicted": told.tau, "tau_measured": measured["tau"], "error": told.speedup / real - 1}
    print(f"{engine} {shape} batch {batch}: predicted {told.speedup:.2f}x, measured {real:.2f}x; tau {told.tau:.2f}, "
          f"{measured['tau']:.2f}", flush=True)  # fmt: skip
    return line


def on_embedded(
    run: Run, ready: ReadyDraft, ends: Ends, prompts: list[list[int]], shapes: list[str]
) -> tuple[list[dict], MeasuredCosts]:
    """Every shape decodes a prompt in turn, with plain decoding before and after, so that a slow moment hits all."""
    settings, target, drafter = run.recipe.evaluate, run.target, ready.drafter()
    prompts = prompts[: settings.speed_prompts]
    times = embedded_times(target, drafter, max(prompts[:3], key=len))
    costs = MeasuredCosts(Probe(engine="embedded", machine="", times=times))
    length, asked = settings.max_new_tokens, [Shape.parse(name) for name in shapes]
    plan: list[Shape | None] = [None, *asked[: len(asked) // 2], None, *asked[len(asked) // 2 :]]
    made: dict[Shape | None, list[Generation]] = {shape: [] for shape in plan}
    plain, speculative = Decoder(target), Decoder(target, drafter)

    def decode(prompt: list[int], shape: Shape | None) -> Generation:
        return (speculative if shape else plain).generate(prompt, Sampling(), length, shape, ends=ends)

    for shape in made:
        decode(prompts[0], shape)  # warm
    with Meter("embedded", len(prompts) * len(plan), "answers") as meter:
        for prompt in prompts:
            for shape in plan:
                made[shape].append(decode(prompt, shape))
                meter.advance(1, len(made[shape][-1].ids))
    texts = list(zip(prompts, (answer.ids for answer in made[None][::2]), strict=True))
    accept = MeasuredProfile(walks_of(target, ready, texts)[0])

    def rate(shape: Shape | None) -> float:
        return sum(len(answer.ids) - 1 for answer in made[shape]) / sum(answer.seconds or 0.0 for answer in made[shape])

    rows = []
    for shape in asked:
        steps = [accepted for answer in made[shape] for accepted in answer.verified]
        measured = {"plain_tokens_per_s": rate(None), "drafted_tokens_per_s": rate(shape)}
        rows.append(row("embedded", shape, 1, measured | {"tau": 1 + statistics.mean(steps)}, costs, accept))
    return rows, costs


def complete(session: Target, prompts: list[list[int]], tokens: int) -> tuple[float, list[Generation]]:
    """Seconds until all prompts, asked at once, have exactly so many tokens, and what was written."""
    started = time.perf_counter()
    answers = dict(session.generate(prompts, Sampling(), tokens, at_once=len(prompts), ignore_end=True))
    return time.perf_counter() - started, [answers[number] for number in range(len(prompts))]


def timed(session: Target, prompts: list[list[int]], short: int, long: int) -> tuple[float, list[Generation]]:
    """(seconds per token of each, the longer answers); the prompts' own time cancels, as runs/probing.py has it."""
    complete(session, prompts, 1)
    brief_s, _ = complete(session, prompts, short)
    whole_s, whole = complete(session, prompts, long)
    return (whole_s - brief_s) / (long - short), whole


def on_vllm(
    run: Run, ready: ReadyDraft, prompts: list[list[int]], count: int, tokens: int
) -> tuple[list[dict], MeasuredCosts]:
    """Decoding alone: two lengths of the same answers, whose difference leaves the prompts out."""
    scratch = run.files.root / "validate-vllm"
    scratch.mkdir(exist_ok=True)
    engine, setup, serve = ENGINES["vllm"], run.setup("vllm", scratch), run.recipe.serve
    beside = run.recipe.model_copy(update={"serve": serve.model_copy(update={"port": serve.port + 1})})
    rows, costs, accept = [], None, None
    with engine.open(replace(setup, recipe=beside), None) as plain:
        for name in (str(REFERENCE), *(c for c in CHAINS if c != str(REFERENCE))):
            shape = Shape.parse(name)
            with engine.open(setup, shape) as drafted:
                complete(drafted, prompts[:1], 8)  # warm
                if shape == REFERENCE:
                    times = server_times(plain, drafted, prompts[count : count + 24], shape)
                    costs = MeasuredCosts(Probe(engine="vllm", machine="vllm", times=times))
                    texts = complete(plain, prompts[:count], tokens)[1]
                    walks = [(prompt, answer.ids) for prompt, answer in zip(prompts, texts, strict=False)]
                    accept = MeasuredProfile(walks_of(run.target, ready, walks)[0])
                for batch in BATCHES:
                    seconds, accepted, steps = [0.0, 0.0], 0, 0
                    for start in range(0, count - batch + 1, batch):
                        for side, session in enumerate((plain, drafted)):
                            per_token, made = timed(session, prompts[start : start + batch], 8, tokens)
                            seconds[side] += per_token
                            accepted += sum(sum(answer.verified) for answer in made)
                            steps += sum(len(answer.verified) for answer in made)
                    measured = {"plain_tokens_per_s": 1 / seconds[0], "drafted_tokens_per_s": 1 / seconds[1]}
                    assert costs is not None
                    assert accept is not None
                    line = row("vllm", shape, batch, measured | {"tau": 1 + accepted / steps}, costs, accept)
                    rows.append({**line, "calibrates": shape == REFERENCE and batch == 1})
    assert costs is not None
    return rows, costs


def ranks(values: list[float]) -> list[float]:
    order = sorted(range(len(values)), key=values.__getitem__)
    return [float(order.index(i)) for i in range(len(values))]


def summary(rows: list[dict]) -> dict:
    counted = [r for r in rows if not r.get("calibrates")]
    told, real = [r["predicted"] for r in counted], [r["measured"] for r in counted]
    return {
        "settings": len(counted),
        "mean_absolute_error": statistics.mean(abs(r["error"]) for r in counted),
        "rank_correlation": statistics.correlation(ranks(told), ranks(real)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--engine", choices=["embedded", "vllm"], default="embedded")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--summary", action="store_true")
    parser.add_argument(
        "--shapes", nargs="+", default=EMBEDDED, help="embedded only: measure these again, keep the rest"
    )
    own, flags = parser.parse_known_args()
    result = files.read_json(OUT) if OUT.exists() else {"rows": []}
    if not own.summary:
        quiet_libraries()
        command, asked = parse(["evaluate", own.recipe, *flags])
        wish = asked.evaluate.model_copy(
            update={"prompts": None, "max_new_tokens": own.tokens, "speed_prompts": own.prompts}
        )
        recipe = asked.model_copy(update={"evaluate": wish})
        run = Run(recipe, command.out or Path("runs") / recipe.name, sys.argv)
        setup = run.setup("embedded", run.files.root)
        evaluation = Evaluation(ENGINES["embedded"], setup, run.files.evaluation_prompts, run.files.root)
        prompts = [question.ids for question in evaluation.questions(run.target.session())]
        ready = ready_draft(run.target, run.files.draft)
        if own.engine == "embedded":
            ends = Ends(run.target.eos_ids, run.target.tokenizer, evaluation.chat.stop)
            rows, costs = on_embedded(run, ready, ends, prompts, own.shapes)
        else:
            rows, costs = on_vllm(run, ready, prompts, own.prompts, own.tokens)
        again = {(r["engine"], r["shape"], r["batch"]) for r in rows}
        kept = [r for r in result["rows"] if (r["engine"], r["shape"], r["batch"]) not in again]
        made = {**result.get("created_with", {}), own.engine: run.created_with.model_dump(mode="json")}
        told = {"prompts": own.prompts, "tokens": own.tokens, "threads": torch.get_num_threads()}
        result = {"created_with": made, "rows": kept + [{**r, **told} for r in rows]}
        result["probes"] = {**result.get("probes", {}), own.engine: costs.probe.model_dump(mode="json")}
    result["summary"] = {"all": summary(result["rows"])} | {
        e: summary([r for r in result["rows"] if r["engine"] == e]) for e in {r["engine"] for r in result["rows"]}
    }
    files.write_json(OUT, result)
    for name, told in sorted(result["summary"].items()):
        print(f"{name}: {told['settings']} settings, mean absolute error {told['mean_absolute_error']:.1%}, rank "
              f"correlation {told['rank_correlation']:.2f}")  # fmt: skip


if __name__ == "__main__":
    main()
