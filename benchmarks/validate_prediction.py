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
from pathlib import Path

import torch

from draftsmith import files
from draftsmith.cli import _quiet_libraries, parse
from draftsmith.decoding.sampling import Sampling
from draftsmith.decoding.speculate import Decoded
from draftsmith.decoding.tree import Shape
from draftsmith.evaluation.evaluate import Evaluation
from draftsmith.evaluation.profile import rank_walks
from draftsmith.evaluation.served import ServedEvaluation
from draftsmith.hardware.accept_length import MeasuredProfile
from draftsmith.hardware.commands import parse_shape
from draftsmith.hardware.cost_model import MeasuredCosts, predict
from draftsmith.hardware.probe import REFERENCE, Server, probe_embedded, probe_server
from draftsmith.progress import Meter
from draftsmith.recipe import DraftShape
from draftsmith.run import Run

OUT = Path(__file__).parent / "results" / "prediction-validation.json"
EMBEDDED = ("1/1/2", "2/1/3", "3/1/4", "5/1/6", "7/1/8", "2/2/4", "3/4/8", "5/4/8", "3/4/16", "5/4/32", "5/8/64")
CHAINS = ("1/1/2", "3/1/4", "5/1/6", "7/1/8")
BATCHES = (1, 4, 16)


def row(engine: str, shape: Shape, batch: int, measured: dict, costs: MeasuredCosts, accept: MeasuredProfile) -> dict:
    told = predict(costs, accept, shape, batch, 128)
    real = measured["drafted_tokens_per_s"] / measured["plain_tokens_per_s"]
    line = {"engine": engine, "shape": str(shape), "batch": batch, "predicted": told.speedup, "measured": real}
    line |= {"tau_predicted": told.tau, "tau_measured": measured["tau"], "error": told.speedup / real - 1}
    print(f"{engine} {shape} batch {batch}: predicted {told.speedup:.2f}x, measured {real:.2f}x; tau {told.tau:.2f}, "
          f"{measured['tau']:.2f}", flush=True)  # fmt: skip
    return line


def on_embedded(run: Run, evaluation: Evaluation, shapes: list[str]) -> tuple[list[dict], MeasuredCosts]:
    """Every shape decodes a prompt in turn, with plain decoding before and after, so that a slow moment hits all."""
    prompts = [ids for _, _, ids in evaluation.prompts[: evaluation.settings.speed_prompts]]
    costs = MeasuredCosts({**probe_embedded(run.target, evaluation.drafter, max(prompts[:3], key=len)), "machine": ""})
    length, asked = evaluation.settings.max_new_tokens, [parse_shape(name) for name in shapes]
    plan: list[Shape | None] = [None, *asked[: len(asked) // 2], None, *asked[len(asked) // 2 :]]
    made: dict[Shape | None, list[Decoded]] = {shape: [] for shape in plan}

    def decode(prompt: list[int], shape: Shape | None) -> Decoded:
        decoder = evaluation.speculative if shape else evaluation.plain
        return decoder.generate(prompt, Sampling(), length, shape, ends=evaluation.ends)

    for shape in made:
        decode(prompts[0], shape)  # warm
    with Meter("embedded", len(prompts) * len(plan), "answers") as meter:
        for prompt in prompts:
            for shape in plan:
                made[shape].append(decode(prompt, shape))
                meter.advance(1, len(made[shape][-1].ids))
    texts = list(zip(prompts, (d.ids for d in made[None][::2]), strict=True))
    drafter = evaluation.drafter
    accept = MeasuredProfile(rank_walks(run.target, drafter.draft, torch.tensor(drafter.ids), texts))

    def rate(shape: Shape | None) -> float:
        return sum(len(d.ids) - 1 for d in made[shape]) / sum(d.seconds for d in made[shape])

    rows = []
    for shape in asked:
        steps = [step.accepted for d in made[shape] for step in d.steps]
        measured = {"plain_tokens_per_s": rate(None), "drafted_tokens_per_s": rate(shape)}
        rows.append(row("embedded", shape, 1, measured | {"tau": 1 + statistics.mean(steps)}, costs, accept))
    return rows, costs


def on_vllm(run: Run, evaluation: Evaluation, count: int, tokens: int) -> tuple[list[dict], MeasuredCosts]:
    """Decoding alone: two lengths of the same answers, whose difference leaves the prompts out."""
    scratch = run.path("validate-vllm")
    scratch.mkdir(exist_ok=True)
    place = "vllm", run.draft_for("vllm"), run.path("prompts", "evaluation.jsonl"), scratch
    serve = run.recipe.serve
    beside = run.recipe.model_copy(update={"serve": serve.model_copy(update={"port": serve.port + 1})})
    alone, served = ServedEvaluation(beside, *place), ServedEvaluation(run.recipe, *place)
    prompts = [ids for _, _, ids in evaluation.prompts]
    drafter, rows, accept = evaluation.drafter, [], None
    with alone.server(None, None) as target:
        plain = Server(target.replicas[0].url, "vllm", "")
        for name in (str(REFERENCE), *(c for c in CHAINS if c != str(REFERENCE))):
            shape = parse_shape(name)
            wish = DraftShape(steps=shape.steps, topk=1, draft_tokens=shape.draft_tokens)
            with served.server(None, wish) as other:
                drafted = Server(other.replicas[0].url, "vllm", "")
                drafted.complete(prompts[:1], 8)  # warm
                if shape == REFERENCE:
                    told = probe_server(plain.url, "vllm", prompts[count : count + 24], "", drafted.url, shape)
                    costs = MeasuredCosts({**told, "machine": "vllm"})
                    texts = plain.complete(prompts[:count], tokens)[1]
                    walks = [(p, g.ids) for p, g in zip(prompts, texts, strict=False)]
                    accept = MeasuredProfile(rank_walks(run.target, drafter.draft, torch.tensor(drafter.ids), walks))
                for batch in BATCHES:
                    seconds, accepted, steps = [0.0, 0.0], 0, 0
                    for start in range(0, count - batch + 1, batch):
                        for side, server in enumerate((plain, drafted)):
                            per_token, _, made = server.decode(prompts[start : start + batch], 8, tokens)
                            seconds[side] += per_token
                            accepted += sum(sum(g.verified) for g in made)
                            steps += sum(len(g.verified) for g in made)
                    measured = {"plain_tokens_per_s": 1 / seconds[0], "drafted_tokens_per_s": 1 / seconds[1]}
                    assert accept is not None
                    line = row("vllm", shape, batch, measured | {"tau": 1 + accepted / steps}, costs, accept)
                    rows.append({**line, "calibrates": shape == REFERENCE and batch == 1})
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
        _quiet_libraries()
        command = parse(["evaluate", own.recipe, *flags])
        wish = command.overrides.evaluate.model_copy(
            update={"prompts": None, "max_new_tokens": own.tokens, "speed_prompts": own.prompts}
        )
        recipe = command.overrides.model_copy(update={"evaluate": wish})
        run = Run(recipe, command.out or Path("runs") / recipe.name, sys.argv)
        evaluation = Evaluation(recipe, run.target, run.draft_directory, run.path("prompts", "evaluation.jsonl"))
        if own.engine == "embedded":
            rows, costs = on_embedded(run, evaluation, own.shapes)
        else:
            rows, costs = on_vllm(run, evaluation, own.prompts, own.tokens)
        again = {(r["engine"], r["shape"], r["batch"]) for r in rows}
        kept = [r for r in result["rows"] if (r["engine"], r["shape"], r["batch"]) not in again]
        made = {**result.get("created_with", {}), own.engine: run.created_with}
        told = {"prompts": own.prompts, "tokens": own.tokens, "threads": torch.get_num_threads()}
        result = {"created_with": made, "rows": kept + [{**r, **told} for r in rows]}
        result["probes"] = {**result.get("probes", {}), own.engine: costs.parts}
    result["summary"] = {"all": summary(result["rows"])} | {
        e: summary([r for r in result["rows"] if r["engine"] == e]) for e in {r["engine"] for r in result["rows"]}
    }
    files.write_json(OUT, result)
    for name, told in sorted(result["summary"].items()):
        print(f"{name}: {told['settings']} settings, mean absolute error {told['mean_absolute_error']:.1%}, rank "
              f"correlation {told['rank_correlation']:.2f}")  # fmt: skip


if __name__ == "__main__":
    main()
