"""From benchmarks/results/*.json to docs/results.md and the tables of README.md; nothing in those is typed by hand.

python benchmarks/results.py collect runs/smollm2-135m-cpu   # a finished run -> benchmarks/results/NAME.json
python benchmarks/results.py render                          # -> docs/results.md, docs/arena.svg, README.md
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

from arena_tables import RESULTS, ablations, arena, arena_block, arena_plot, table

from draftsmith.cli import quiet_libraries
from draftsmith.core import run_files
from draftsmith.core.files import JsonObject, read_json, write_atomic, write_json
from draftsmith.core.recipe_file import load_recipe
from draftsmith.core.records.data import CompletionsSummary, Timing
from draftsmith.core.records.evaluation import Acceptance, Results, Tau
from draftsmith.core.records.run import Manifest, Provenance
from draftsmith.core.records.training import TrainingSummary
from draftsmith.core.run_files import RunFiles
from draftsmith.core.shape import Shape
from draftsmith.engines import ENGINES
from draftsmith.evaluation.acceptance import INTERVAL_PROMPTS, paired_difference
from draftsmith.evaluation.lossless import lossless_verdict
from draftsmith.runs.estimates import costs_of, plan_of
from draftsmith.runs.run import Run

ROOT = Path(__file__).parents[1]
FIRST = "smollm2-135m-cpu"  # what README shows
PROBE = "benchmarks/results/probe-epyc-2-avx2.json"
CASES = (  # README's three ways to begin
    ("a small model on this CPU", "smollm2-135m-cpu", PROBE),
    ("Qwen3-8B on one 80 GB GPU", "qwen3-8b-eagle3", "h100-1"),
    ("a served 230 B MoE", "minimax-m2.7-eagle3", "h200-nvlink-8"),
)
TITLES = {
    "smollm2-135m-cpu": "SmolLM2-135M-Instruct, one draft on three engines",
    "smollm2-135m-gpu": "SmolLM2-135M-Instruct, the draft of the H200 and 40 steps on this CPU, the best of 160",
    "gemma3-270m-cpu": "Gemma-3-270m, the longer CPU recipe",
    "gemma3-270m-vllm-bf16": "The same draft on vLLM, bf16",
    "gemma3-270m-vllm-fp32": "The same draft on vLLM, fp32",
    "gemma3-270m-sglang": "The same draft on SGLang",
    "gemma3-270m-three-engines": "Gemma-3-270m, one draft of 1,200 steps on three engines",
}


def collect(directory: Path) -> Path:
    """One file of everything that a run measured."""
    run = RunFiles(directory)
    told: JsonObject = {}
    for name, path in run.results.items():
        lean = {"profile": None, "sampled_profile": None}
        told[name] = Results.load(path).model_copy(update=lean).model_dump(mode="json")
    told["training"] = TrainingSummary.load(run.train / run_files.SUMMARY).model_dump(mode="json")
    told["completions"] = CompletionsSummary.load(run.completions / run_files.SUMMARY).model_dump(mode="json")
    told["timing"] = Timing.load(run.completions / run_files.TIMING).model_dump(mode="json")
    told["stages"] = Manifest.load(run.manifest).model_dump(mode="json")["stages"]
    path = RESULTS / f"{directory.name}.json"
    write_json(path, told)
    return path


def results_of(told: JsonObject) -> Results:
    """An evaluation as it was recorded; earlier commits left out what could not be otherwise then."""
    parts = {name: told[name] for name in Results.model_fields if name in told}
    parts["settings"] = {"engine": "embedded", **told["settings"]}
    parts["acceptance"] = [{"prompts": [], **entry} for entry in told["acceptance"]]
    parts["speed"] = [
        {"batch": 1, **entry, "differences": [{"shape": entry["shape"], **d} for d in entry["differences"]]}
        for entry in told["speed"]
    ]
    if told["lossless"]:
        parts["lossless"] = {key: value for key, value in told["lossless"].items() if key != "identical"}
    return Results.model_validate(parts)


def measured(told: JsonObject) -> Iterator[tuple[str, Results]]:
    """(engine, results) of a file, whichever form it has."""
    for inner in (told, *told.values()):
        if isinstance(inner, dict) and "acceptance" in inner:
            results = results_of(inner)
            yield ENGINES[results.settings.engine].title, results


def honest(value: Tau) -> str:
    """Files of earlier commits hold intervals over fewer prompts than carry one."""
    return str(value if value.prompts >= INTERVAL_PROMPTS else value.model_copy(update={"low": None}))


def acceptance_table(results: list[tuple[str, Results]]) -> list[str]:
    categories = sorted({c for _, r in results for e in r.acceptance for c in e.by_category})
    rows = []
    for engine, result in results:
        for e in result.acceptance:
            taus = [honest(e.by_category[c]) if c in e.by_category else "-" for c in categories]
            loops = [f"{e.tau_with_loops:.2f}", f"{e.looping_share:.0%}"]
            oracle = f"{e.share_of_oracle:.0%}" if e.share_of_oracle else "-"
            what = [engine, result.settings.dtype, str(e.shape), f"{e.temperature:g}", e.drafts]
            rows.append([*what, str(e.all.prompts), honest(e.all), *taus, *loops, oracle])
    head = [
        "engine",
        "dtype",
        "shape",
        "T",
        "drafts",
        "prompts",
        "tau",
        *categories,
        "with loops",
        "looping",
        "of the oracle",
    ]
    return table(head, rows)


def speed_table(results: list[tuple[str, Results]]) -> list[str]:
    rows = [
        [
            engine,
            s.dtype,
            str(s.shape),
            str(s.batch),
            str(s.prompts),
            f"{s.plain_tokens_per_s:.1f}",
            f"{s.drafted_tokens_per_s:.1f}",
            f"{s.speedup:.2f}x",
        ]
        for engine, result in results
        for s in result.speed
    ]
    head = ["engine", "dtype", "shape", "batch", "prompts", "plain tokens/s", "drafted tokens/s", "median speed-up"]
    return table(head, rows) if rows else []


def sampled_gains(results: list[tuple[str, Results]]) -> list[str]:
    """What drawing drafts gains on taking their first choices, prompt by prompt."""
    ways: dict[tuple[str, str, float], dict[str, Acceptance]] = {}
    for engine, result in results:
        for e in result.acceptance:
            if e.temperature and e.prompts:
                ways.setdefault((engine, str(e.shape), e.temperature), {})[e.drafts] = e
    lines = []
    for (engine, shape, temperature), both in ways.items():
        if len(both) == 2:
            gain = str(paired_difference(both["greedy"].prompts, both["sampled"].prompts))
            told = gain.replace("against the first on", "against greedy ones on")
            lines.append(f"- {engine} {shape}, T={temperature:g}: sampled drafts {told}")
    return lines


def sets_table(results: list[tuple[str, Results]]) -> list[str]:
    """Of the sets that people quote: all turns, macro average over categories, what is accepted by depth."""
    rows = [
        [
            *(engine, found.name, str(e.shape), f"{e.temperature:g}", e.drafts),
            f"{found.prompts} of {found.prompts_available}",
            honest(e.all),
            f"{e.macro:.2f}" if e.macro and len(e.by_category) > 1 else "-",
            ", ".join(f"{category} {value.short}" for category, value in e.by_category.items()),
            " / ".join("-" if share is None else f"{share:.2f}" for share in e.acceptance_by_depth),
            ", ".join(f"to {edge:,} {value.short}" for edge, value in e.by_context.items()),
        ]
        for engine, result in results
        for found in result.sets
        for e in found.acceptance
    ]
    head = ["engine", "set", "shape", "T", "drafts", "prompts", "tau", "mean of the categories", "categories"]
    head += ["accepted by depth", "by tokens of context"]
    return ["", *table(head, rows)] if rows else []


def provenance(created: Provenance) -> str:
    return f"commit {created.commit}, {created.hardware}: `{created.command}`"


def section(name: str, told: JsonObject) -> list[str]:
    results = list(measured(told))
    lines = [f"## {TITLES.get(name, name)}", ""]
    trained = told.get("training")
    if trained:
        lines += [
            f"{trained['parameters'] / 1e6:.1f} M parameters, {trained['steps']:,} steps over {trained['tokens']:,} "
            f"tokens, status {trained['status']}.",
            "",
        ]
    lines += [*acceptance_table(results), *sets_table(results), ""]
    lines += sampled_gains(results)
    verdicts = [(engine, lossless_verdict(r.lossless)) for engine, r in results if r.lossless]
    lines += [f"- losslessness on {engine}: {v.state}; {v.detail}" for engine, v in verdicts]
    speeds = speed_table(results)
    lines += ["", *speeds, ""] if speeds else [""]
    lines += [f"- {engine}: {provenance(r.created_with)}" for engine, r in results]
    return [*lines, ""]


def throughput() -> list[str]:
    """On equal work: ours with a loss on every token, as the peers make logits of all of them whatever carries it."""
    trained, written = read_json(RESULTS / "train-throughput.json"), read_json(RESULTS / "regenerate-throughput.json")
    rows = [
        [
            *(r["system"], r["version"], r["dtype"], str(r["batch"]), f"{r['tokens_per_s']:.0f}"),
            f"{r['above_target_bytes'] / 1e9:.2f} GB",
            f"{r['share_of_matmul_peak']:.0%}" if "share_of_matmul_peak" in r else "-",
        ]
        for run in trained["runs"]
        for r in run["result"]["rows"]
        if r["dtype"] == "bf16" and (r["system"] != "draftsmith" or run["result"]["loss"] == "all")
    ]
    rows.sort(key=lambda row: int(row[3]))
    head = ["system", "version", "dtype", "batch of 512", "tokens/s", "memory above the target", "of the matmul peak"]
    commands = "; ".join(f"`{run['command']}`" for run in trained["runs"])
    result = written["result"]
    return [
        "## Training throughput beside the peers",
        "",
        "Gemma-3-270m, draft vocabulary 8,192, TTT 7, a loss on every token: the peers make logits of all and mask "
        f"those without one, so their time is the same whatever carries it. {trained['hardware']['cpu']}, 2 cores, "
        f"commit {trained['commit']}: {commands}.",
        "",
        *table(head, rows),
        "",
        f"Regeneration at batch {result['batch']}: {result['draftsmith']:.0f} completion tokens/s, `transformers`' own "
        f"`generate` {result['transformers']:.0f} (`{written['command']}`).",
        "",
    ]


def decoding() -> list[str]:
    """Of benchmarks/decode.py: the embedded engine at batch 1, and where a step goes."""
    if not (RESULTS / "decode.json").exists():  # needs both cores to itself
        return []
    told = read_json(RESULTS / "decode.json")
    rows = [
        [
            r["shape"],
            f"{r['temperature']:g}",
            f"{r['tokens_per_s']:.1f}",
            f"{r['tau']:.2f}",
            *(f"{r[part]:.1f}" for part in ("step_ms", "target_ms", "draft_ms", "host_ms")),
            f"{r['host_share']:.0%}",
        ]
        for r in told["steps"]
    ]
    head = ["shape", "T", "tokens/s", "tau", "step ms", "target ms", "draft ms", "host ms", "host share"]
    batch, vllm = told["regeneration"], told.get("vllm")
    beside = f"vLLM {vllm['plain_tokens_per_s']:.1f} tokens/s at batch 1 and " if vllm else ""
    beside += f"{vllm['regeneration_tokens_per_s']:.0f} regenerating. " if vllm else ""
    return [
        "## Where a step of the embedded engine goes",
        "",
        "Loops included, as the time of a step does not depend on the text ([decoding.md](decoding.md)).",
        "",
        *table(head, rows),
        "",
        f"Regeneration at batch {batch['batch']}: {batch['tokens_per_s']:.0f} completion tokens/s. {beside}"
        f"{provenance(Provenance(**told['created_with']))}",
        "",
    ]


def on_gpus() -> list[str]:
    machines = [read_json(RESULTS / f"{name}.json") for name in ("h100", "h200")]
    rows = [
        [
            *(
                r["system"],
                told["device"].removeprefix("NVIDIA "),
                r["draft"],
                f"{r['documents']} x {r['length']}",
                f"{r['tokens_per_s']:,.0f}",
            ),
            f"{r['mfu']:.0%}" if r.get("mfu") else "-",  # nobody counts a peer's arithmetic
            f"{r['peak_bytes'] / 1e9:.1f} GB",
            f"{r['kernels']:,}" if "kernels" in r else "-",
        ]
        for told in machines
        for r in told["rows"]
        if "failed" not in r
    ]
    small, long = (told["small_draft"] for told in machines)
    curve = ", ".join(f"{tau:.2f} after {int(step):,}" for step, tau in long["held_out_tau"].items())
    return [
        "## Training on a GPU",
        "",
        *(
            f"{told['device']}, torch {told['torch']}, commit {told['commit']}: `{told['command']}`. Beside it: "
            f"{told['peers']}.\n"
            for told in machines
        ),
        *table(["system", "card", "draft of", "pack", "tokens/s", "MFU", "peak memory", "kernels a step"], rows),
        "",
        f"A small draft waits for the host that launches its kernels: {small['step_s'] * 1e3:.0f} ms a step of "
        f"{small['step_tokens']:,} tokens, {small['fastest_step_s'] * 1e3:.0f} the fastest of {small['steps']} "
        f"(`{small['command']}`; held-out tau {small['held_out_tau_of_600_steps']:.2f} after 600 of them).",
        "",
        f"A longer one, on an H200: {long['completion_tokens']:,} tokens of {long['completions']:,} answers, "
        f"{long['greedy_tokens'] / long['completion_tokens']:.0%} of them greedy, written at "
        f"{long['regenerate_tokens_per_s']:,.0f} tokens/s by the embedded engine at batch "
        f"{long['regenerate_batch']:,}; {long['steps']:,} of {long['planned_steps']:,} steps of "
        f"{long['step_tokens']:,} tokens before the loan ended; held-out tau {curve} steps (`{long['command']}`). What "
        "one switch changes there is in [ablations.md](ablations.md).",
        "",
    ]


def predictions() -> list[str]:
    told = read_json(RESULTS / "prediction-validation.json")["summary"]
    plans = read_json(RESULTS / "plan-validation.json")["runs"]
    rows = [
        [name, str(s["settings"]), f"{s['mean_absolute_error']:.1%}", f"{s['rank_correlation']:.2f}"]
        for name, s in told.items()
    ]
    ratios = [abs(r["ratio"] - 1) for run in plans for r in run["rows"]]
    return [
        "## Predictions against measurements",
        "",
        *table(["engine", "settings", "mean absolute error", "rank correlation"], rows),
        "",
        f"`plan` on {len(plans)} runs, {len(ratios)} figures: the worst is {max(ratios):.0%} off.",
        "",
    ]


def document() -> str:
    names = [FIRST, *(n for n in TITLES if n != FIRST)]
    parts = ["# Results", "", "Made by `python benchmarks/results.py render` from `benchmarks/results/`.", ""]
    parts += [
        "tau = 1 + accepted draft tokens / verification steps; the bonus token counts, the prefill token does not, "
        "text after the onset of a loop is left out (beside it: with loops, and their share of the text). A shape is "
        "steps/top-k/draft tokens; top-k 1 is a chain. Brackets are 95 % intervals over prompts, from ten on. "
        "The oracle is a chain that always proposes the target's first choice; status preview: tau was not seen to "
        "stop rising before training ended. "
        "Commands are those of the commit that is named; those of older ones have lost their quotes.",
        "",
    ]
    for name in names:
        if (RESULTS / f"{name}.json").exists():
            parts += section(name, read_json(RESULTS / f"{name}.json"))
    return "\n".join([*parts, *arena(), *throughput(), *decoding(), *on_gpus(), *predictions()]).rstrip() + "\n"


def of_minutes_on_a_gpu() -> str:
    told, small = read_json(RESULTS / "smollm2-135m-gpu.json"), read_json(RESULTS / "h200.json")["small_draft"]
    here = results_of(told["embedded"])
    taus = {(e.shape, e.temperature, e.drafts): e.all for e in here.acceptance}
    speed = max((s for s in here.speed if s.batch == 1), key=lambda s: s.speedup)
    chain, own = Shape.chain(3), ENGINES["embedded"].title
    others = [f"{r.acceptance[0].all.tau:.2f} on {engine}" for engine, r in measured(told) if engine != own]
    greedy = [
        (found.name, e) for found in here.sets for e in found.acceptance if (e.shape, e.temperature) == (chain, 0)
    ]
    sets = ", ".join(f"{name} {e.all.short}" for name, e in greedy)
    sets += f" ({', '.join(str(e.all.prompts) for _, e in greedy)} prompts)"
    return (
        f"From {small['completion_tokens'] / 1e6:.1f} M tokens, minutes on an H200 and 40 steps here: "
        f"{taus[chain, 0, 'greedy']} at {chain} ({', '.join(others)}), "
        f"{taus[Shape(3, 4, 8), 0, 'greedy']} as a tree, {taus[chain, 1, 'sampled']} sampled at T = 1; "
        f"{speed.plain_tokens_per_s:.1f} → {speed.drafted_tokens_per_s:.1f} tokens/s; {sets}."
    )


def first_table() -> str:
    told = dict(measured(read_json(RESULTS / f"{FIRST}.json")))
    rows = []
    for engine, result in told.items():
        speeds = {s.shape: s for s in result.speed if s.batch == 1}
        for e in (e for e in result.acceptance if e.temperature == 0 or e.drafts == "sampled"):
            taus = [f"{e.by_category[c].tau:.2f}" for c in ("chat", "code", "math")]
            speed = speeds.get(e.shape) if e.temperature == 0 else None
            gain = "-"
            if speed:
                gain = f"{speed.plain_tokens_per_s:.1f} → {speed.drafted_tokens_per_s:.1f} tokens/s"
            rows.append([engine, str(e.shape), e.how.removeprefix("T="), str(e.all), " / ".join(taus), gain])
    head = ["engine", "shape", "T", "tau [95 %]", "chat / code / math", "batch 1, plain → drafted"]
    return "\n".join([*table(head, rows), "", of_minutes_on_a_gpu()])


def cases_table() -> str:
    rows = []
    for what, name, machine in CASES:
        recipe = load_recipe(ROOT / "recipes" / f"{name}.yaml")
        run = Run(recipe, ROOT / "runs" / "none", [])
        here = machine if "/" not in machine else str(ROOT / machine)
        told = plan_of(run, costs_of(run, here))
        text = {what: line for section in told.sections.values() for what, line in section}
        memory = f"{text['target'].split(':')[0]} (target), {text['trainer'].split(':')[0]} (trainer)"
        rows.append([what, f"[{name}](recipes/{name}.yaml)", text["all"], memory, text["disk in all"].split(",")[0]])
    return "\n".join(table(["case", "recipe", "time", "memory", "disk"], rows))


def between(text: str, mark: str, content: str) -> str:
    pattern = rf"(<!-- {mark} -->\n).*?(\n<!-- end {mark} -->)"
    assert re.search(pattern, text, re.DOTALL), f"README.md has no {mark}"
    return re.sub(pattern, lambda m: m[1] + content + m[2], text, flags=re.DOTALL)


def readme() -> str:
    text = (ROOT / "README.md").read_text()
    made = {"results": first_table(), "arena": arena_block(), "cases": cases_table()}
    for mark, content in made.items():
        text = between(text, mark, content)
    return text


if __name__ == "__main__":
    quiet_libraries()
    if sys.argv[1:2] == ["collect"]:
        print(collect(Path(sys.argv[2])))
    else:
        write_atomic(ROOT / "docs" / "results.md", document())
        write_atomic(ROOT / "docs" / "arena.svg", arena_plot())
        write_atomic(ROOT / "docs" / "ablations.md", ablations())
        write_atomic(ROOT / "README.md", readme())
