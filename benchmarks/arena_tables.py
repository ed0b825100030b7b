"""What benchmarks/arena.py measured, as tables and a plot; results.py puts them into the documents."""

import statistics
from pathlib import Path

import numpy as np

from draftsmith.core.files import JsonObject, read_json
from draftsmith.evaluation.plots import Points, line_plot

RESULTS = Path(__file__).parent / "results"
OURS, GREEDY, SAMPLED = "draftsmith", "all T=0", "all T=1 sampled"
WAYS = {"T=0": "T=0", "T=1 greedy": "T=1 taken greedily", "T=1 sampled": "T=1 sampled"}
ARENA = (OURS, "speculators", "speculators-1e-2", "specforge", "specforge-tuned", "specforge-3e-3")


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]


def arena_rows(told: JsonObject) -> dict[str, dict[float, JsonObject]]:
    """By system and share of the budget, the mean over seeds of every number."""
    by_place: dict[str, dict[float, list[JsonObject]]] = {}
    for row in told["rows"]:
        tau = row["tau"]
        numbers = {key: row[key] for key in ("tokens", "cpu_s", "wall_s", "steps", "above_target_bytes")}
        numbers |= {f"{group} {way}": value for group in ("all", "like", "unlike") for way, value in tau[group].items()}
        numbers |= {engine: tau[engine]["tau"] for engine in ("tree", "vllm") if engine in tau}
        by_place.setdefault(row["system"], {}).setdefault(row["share"], []).append(numbers)
    return {
        system: {
            share: {
                key: statistics.mean(one[key] for one in same) for key in same[0] if all(key in one for one in same)
            }
            | {"seeds": len(same)}
            for share, same in sorted(shares.items())
        }
        for system, shares in by_place.items()
    }


def arena_curve(points: dict[float, JsonObject], key: str) -> Points:
    """(CPU seconds, tau), from nothing learned on."""
    return [0.0, *(p["cpu_s"] for p in points.values())], [1.0, *(p[key] for p in points.values())]


def time_to(curve: Points, tau: float) -> float | None:
    """CPU seconds at which a curve first reaches tau, along straight lines between its points."""
    seconds, taus = curve
    for i in range(1, len(taus)):
        if taus[i] >= tau:
            return seconds[i - 1] + (seconds[i] - seconds[i - 1]) * (tau - taus[i - 1]) / (taus[i] - taus[i - 1])
    return None


def arena_systems(result: str) -> dict[str, dict[float, JsonObject]]:
    told = arena_rows(read_json(RESULTS / f"{result}.json"))
    return {name: told[name] for name in ARENA if name in told}


def arena_table(result: str = "arena", memory: bool = True) -> str:
    rows = []
    for name, points in arena_systems(result).items():
        last = points[max(points)]
        taus = [
            f"{last[key]:.2f}" if key in last else "-"
            for key in (GREEDY, "vllm", "tree", "unlike T=0", "all T=1 greedy", SAMPLED)
        ]
        spent = [f"{last['cpu_s']:.0f}", f"{last['tokens'] / 1000:.0f} k", f"{last['tokens'] / last['cpu_s']:.0f}"]
        held = [f"{last['above_target_bytes'] / 1e9:.2f} GB"] if memory else []
        rows.append([name, str(last["seeds"]), *taus, *spent, *held])
    taus = ["3/1/4", "by vLLM", "3/4/8", "3/1/4, foreign prompts", "3/1/4, T=1", "T=1, sampled drafts"]
    spent = ["CPU s", "tokens trained on", "tokens per CPU s", *(["memory above the target"] if memory else [])]
    return "\n".join(table(["system", "seeds", *taus, *spent], rows))


def arena_times(result: str = "arena") -> str:
    """CPU seconds until the best tau of any peer is reached, beside what that peer took."""
    systems, told = arena_systems(result), []
    for what, key in (("T=0", GREEDY), ("T=1 with sampled drafts", SAMPLED)):
        peers = [(p[key], p["cpu_s"], name) for name in systems if name != OURS for p in systems[name].values()]
        tau, spent, name = max(peers)
        ours = time_to(arena_curve(systems[OURS], key), tau)
        reached = f"in {ours:.0f}" if ours else "not within them"
        told.append(f"{what}: {name}'s {tau:.2f} of {spent:.0f} CPU seconds is reached {reached}")
    return "; ".join(told) + "."


def arena_gains(result: str = "arena") -> str:
    """Accepted drafts a step, tau - 1, at the end of the budget, beside the best that any peer has there."""
    ends = {name: points[max(points)] for name, points in arena_systems(result).items()}

    def gain(key: str) -> str:
        best = max(end[key] - 1 for name, end in ends.items() if name != OURS)
        return f"{(ends[OURS][key] - 1) / best - 1:+.0%}"

    like, foreign = (
        ", ".join(f"{gain(f'{group} {way}')} at {title}" for way, title in WAYS.items()) for group in ("all", "unlike")
    )
    return f"Accepted drafts a step (tau - 1) beside the best peer's: {like}; on foreign prompts alone {foreign}."


def arena_block() -> str:
    """README's."""
    return f"{arena_table()}\n\n{arena_times()} {arena_gains()}"


def at_equal_tokens(result: str = "arena") -> list[str]:
    """Of those that read so many, along straight lines between what was measured."""
    systems = arena_systems(result)
    tokens = min(points[max(points)]["tokens"] for name, points in systems.items() if name != "specforge")
    keys = [f"{group} {way}" for group in ("all", "unlike") for way in WAYS]
    rows = []
    for name, points in systems.items():
        read = [0, *(point["tokens"] for point in points.values())]
        if read[-1] >= tokens:
            taus = ([1.0, *(point[key] for point in points.values())] for key in keys)
            rows.append([name, *(f"{np.interp(tokens, read, line):.2f}" for line in taus)])
    head = [f"{group}{title}" for group in ("", "foreign, ") for title in WAYS.values()]
    return [f"At equal tokens, {tokens:,.0f} of them:", "", *table(["system", *head], rows)]


def arena() -> list[str]:
    told = read_json(RESULTS / "arena.json")
    rows = [
        [
            *(r["system"], r["version"], str(r["seed"]), f"{r['share']:g}", f"{r['cpu_s']:.0f}", f"{r['tokens']:,}"),
            *(f"{value:.2f}" for way in ("all", "unlike") for value in r["tau"][way].values()),
            *(f"{r['tau'][engine]['tau']:.2f}" if engine in r["tau"] else "-" for engine in ("tree", "vllm")),
            " / ".join(f"{share:.2f}" for share in r["tau"]["depths"][:3]),
        ]
        for r in told["rows"]
        if r["system"] in ARENA
    ]
    ways = [f"{group}{way}" for group in ("", "foreign ") for way in ("T=0", "T=1", "T=1 sampled")]
    head = [
        "system",
        "version",
        "seed",
        "share",
        "CPU s",
        "tokens",
        *ways,
        "3/4/8, T=0",
        "vLLM, T=0",
        "right by depth, T=0",
    ]
    data, cpu = told["data"], told["hardware"]["cpu"]
    return [
        "## Accept length by time, beside the peers",
        "",
        f"SmolLM2-135M-Instruct, fp32, {cpu}, 2 cores, judged and put together by commit {told['commit']}: "
        f"`benchmarks/arena.py`, {told['seconds']:g} CPU seconds of training for everyone, "
        f"{data['completion_tokens']:,} completion tokens, {data['prompts']} prompts. "
        "What was bypassed of the peers, and how text is judged, is told there. "
        f"{arena_times()} {arena_gains()}",
        "",
        *table(head, rows),
        "",
        *at_equal_tokens(),
        "",
        *second_target(),
    ]


def second_target() -> list[str]:
    told = read_json(RESULTS / "arena-gemma3-270m-cpu.json")
    return [
        f"The same of Gemma-3-270m, in fp32 ({told['hardware']['cpu']}, 2 cores, commit {told['commit']}; "
        f"`benchmarks/arena.py --recipe gemma3-270m-cpu`, {told['data']['completion_tokens']:,} completion tokens, "
        f"{told['seconds']:g} CPU seconds). {arena_times('arena-gemma3-270m-cpu')} "
        f"{arena_gains('arena-gemma3-270m-cpu')} Memory is not told: loading this "
        "target takes more than training does.",
        "",
        *arena_table("arena-gemma3-270m-cpu", memory=False).splitlines(),
        "",
    ]


def ablation_table(told: JsonObject) -> list[str]:
    """Every switch that ran on one text, beside the recipe as it is."""
    means = arena_rows(told)
    changed = {r["system"]: r["changed"] for r in told["rows"] if r["changed"] or r["system"] == OURS}
    rows = []
    for name in sorted(changed, key=lambda name: (name != OURS, name)):
        last = means[name][max(means[name])]
        base = means[OURS][max(means[OURS])]
        taus = [f"{last[k]:.3f} ({last[k] - base[k]:+.3f})" for k in (GREEDY, "unlike T=0", "all T=1 greedy", SAMPLED)]
        cost = [f"{last['tokens'] / 1000:.0f} k", f"{last['cpu_s']:.0f}"]
        rows.append([switches(changed[name]), str(last["seeds"]), *cost, *taus])
    return table(["changed", "seeds", "tokens", "CPU s", "T=0", "foreign, T=0", "T=1", "T=1, sampled drafts"], rows)


def ablations() -> str:
    files = ("arena", "arena-random-start", "arena-newton-schulz")
    now, random, before = (read_json(RESULTS / f"{name}.json") for name in files)
    lines = [
        "# Ablations",
        "",
        "Made by `python benchmarks/results.py render` from `benchmarks/results/`: one switch each of "
        "`recipes/smollm2-135m-cpu.yaml` with no loss on prompts and no weight decay, "
        f"{now['data']['completion_tokens']:,} tokens of text, all of them drawn, "
        f"{now['seconds']:g} CPU seconds of training (`python benchmarks/arena.py --only NAME`), tau of the chain "
        "3/1/4, in brackets the difference to the first row. What did not help stays here. Not run: several samples "
        "of a prompt, a second layer, a sliding window, an earlier draft as a start, total variation, a share of "
        "hard cross-entropy, positions weighed by the measured chance to be reached (a decay of 0.4 a step is near "
        "it), a vocabulary weighed otherwise than by counts. Seeds differ by about as much as the rows of "
        "`docs/results.md` show.",
        "",
        *ablation_table(now),
        "",
        f"By commits up to {random['commit']}, when a draft started from random numbers, with "
        "`train.learning_rate 0.008`:",
        "",
        *ablation_table(random),
        "",
        f"The same by commit {before['commit'].removesuffix('+dirty')} on another text, when five steps of "
        "Newton-Schulz made Muon's update:",
        "",
        *ablation_table(before),
        "",
        *whole_recipe(),
        "",
        *on_a_gpu(),
        "",
        *split_of_an_hour(),
    ]
    return "\n".join(lines) + "\n"


def whole_recipe() -> list[str]:
    """What the short runs above cannot tell."""
    told = read_json(RESULTS / "smollm2-135m-hour.json")
    marks = sorted({int(step) for row in told["rows"] for step in row["held_out_tau"]})
    rows = [
        [
            *(switches(row["changed"]), row["commit"]),
            *(f"{row['held_out_tau'][str(step)]:.3f}" for step in marks),
            " / ".join(f"{alpha:.3f}" for alpha in row.get("held_out_alpha", [])) or "-",
        ]
        for row in told["rows"]
    ]
    return [
        "A longer run wants a smaller rate than fifty steps do, and reads its text four times: tau on held-out "
        f"completions after so many steps of `{told['command']}` ({told['hardware']}, the arena's completions, one "
        "seed), and the chance in the end that a sampled draft is accepted:",
        "",
        *table(["changed", "commit", *map(str, marks), "alpha by depth in the end"], rows),
    ]


def on_a_gpu() -> list[str]:
    """Millions of tokens, where a switch that costs a CPU its few steps may pay."""
    told = read_json(RESULTS / "gpu-ablations.json")
    marks = sorted({step for cell in told["cells"] for step in cell["tau"]}, key=int)
    rows = []
    for cell in told["cells"]:
        given = {
            f"{part}.{key}": value
            for part, values in cell["changed"].items()
            if isinstance(values, dict)
            for key, value in values.items()
        }
        given |= {"a random start": ""} if cell["changed"].get("random") else {}
        given |= {f"one in {cell['changed']['text']} of the completions": ""} if cell["changed"].get("text") else {}
        taus = [f"{cell['tau'][step]:.3f}" if step in cell["tau"] else "-" for step in marks]
        depths = [" / ".join(f"{x:.3f}" for x in cell[kind]) for kind in ("match", "alpha")]
        cost = [f"{cell[key] / 1e6:.1f} M" for key in ("text_tokens", "read_tokens")]
        seconds = f"{cell['seconds']:.0f}" if cell["seconds"] else "-"
        rows.append([switches(given), *cost, seconds, *taus, *depths])
    return [
        f"Where minutes are millions of tokens ({told['device']}, commit {told['commit'].split()[0]}: "
        f"`{told['command']}`, RUN being the H200's of [results.md](results.md#training-on-a-gpu), "
        "`train.objective soft_ce`, packs of 8,192 tokens, 256 completions held out, one seed): held-out tau after so "
        f"many steps of a whole schedule of {marks[-1]}, and in the end, by depth, the shares of drafts that are the "
        "target's own token and the chances that a sampled one is accepted (with `lk_lambda` by the target's whole "
        "distribution, else by the one renormalised over the draft vocabulary, a little too high). Text with its "
        "prompts; seconds beside other jobs. A cell without a last tau was cut off when the machine went back; its "
        "shares are those of its last tau.",
        "",
        *table(["changed", "text", "read", "seconds", *marks, "greedy by depth", "sampled by depth"], rows),
    ]


def split_of_an_hour() -> list[str]:
    """Runs of one recipe on different texts: only what decoding measured can be compared."""
    rows = []
    for name in ("smollm2-135m-drawn", "smollm2-135m-100k", "smollm2-135m-cpu"):
        told = read_json(RESULTS / f"{name}.json")
        here, stages, written = told["embedded"], told["stages"], told["completions"]
        how = {(e["shape"], e["temperature"], e["drafts"]): e for e in here["acceptance"]}
        wanted = [("3/1/4", 0, "greedy"), ("3/1/4", 1, "greedy"), ("3/1/4", 1, "sampled"), ("3/4/8", 0, "greedy")]
        greedy = written.get("greedy_tokens", 0) / written["completion_tokens"]
        text = [f"{written['completion_tokens']:,}", f"{greedy:.0%}"]
        last_sitting = {"tokens_per_s": written["completion_tokens"] / stages["regenerate"]["seconds"]}
        writing = written["completion_tokens"] / told.get("timing", last_sitting)["tokens_per_s"]
        minutes = [f"{seconds / 60:.0f} min" for seconds in (writing, stages["train"]["seconds"])]
        taus = [f"{how[key]['all']['tau']:.2f}" for key in wanted]
        rows.append([*text, f"{told['training']['tokens']:,}", *minutes, *taus, here["created_with"]["commit"]])
    head = ["completion tokens", "greedily", "trained on", "regenerate", "capture and train"]
    ways = ["3/1/4, T=0", "3/1/4, T=1", "T=1, sampled drafts", "3/4/8, T=0", "commit"]
    return [
        "How an hour is split between writing and training, and how much of the text is greedy (the embedded engine's "
        "decoding of the 30 prompts of README; the first draft started at random; some times are beside other work):",
        "",
        *table([*head, *ways], rows),
    ]


def switches(changed: JsonObject) -> str:
    return ", ".join(f"`{key} {value}`" if value != "" else key for key, value in changed.items()) or "nothing"


def arena_plot() -> str:
    """The curves of README, on a ground of their own: a page that is dark would swallow the text."""
    series = {name: arena_curve(points, GREEDY) for name, points in arena_systems("arena").items()}
    plot = str(line_plot("Accept length by CPU seconds of training", ("CPU seconds", "tau, chain 3/1/4, T=0"), series))
    return plot.replace(">", "><style>svg{background:#fff}</style>", 1) + "\n"
