"""Time to accept length beside SpecForge and speculators: one target, one text, so many CPU seconds for everyone.

    bash benchmarks/install_peers.sh .peers-venv
    python benchmarks/arena.py --peers .peers-venv --seconds 300 --seeds 1 2
    python benchmarks/arena.py --only draftsmith --seeds 1    # one cell; whatever is done already is kept
    python benchmarks/arena.py --vllm '/opt/vllm/bin/vllm serve'    # judge by vLLM, too
    python benchmarks/arena.py --recipe gemma3-270m-cpu    # the other target

SmolLM2-135M-Instruct in fp32 writes the completions of recipes/smollm2-135m-cpu.yaml, once (--work/run, which may be a
copy of a finished run: its prompts, completions and vocab are taken as they are), or Gemma-3-270m those of its recipe;
RECIPES says what is changed of these. Every system trains an EAGLE-3 draft of the same shape, taps and draft vocabulary
on them, a document at a time, loss on what the target wrote, for the same CPU seconds of steps (target forward
included; loading, compiling and saving are not), measured by a few steps on a draft that is thrown away. At SHARES of
the steps the draft is exported as engines read it.

The peers train with their own model, loss, optimiser, schedule and defaults (specforge-tuned, specforge-3e-3,
speculators-1e-2: other learning rates; all but specforge: the depth of ours). Bypassed of them: launchers, data
preparation, capture servers and loaders, FSDP; what a CPU forces is marked in peers.py (loss and attention without
Triton and flex attention; Muon iterates in fp32, which makes speculators faster here). speculators packs 1,024 tokens a
step instead of 8,192, as ours does, and has its norm where SGLang has it; SpecForge takes its default of one document a
step, with fp32 weights. Ours is the train stage's own trainer, with settings for so few steps (RECIPES) and capture
online instead of offline, so that everyone pays for the target's forward. Drafts are written for engines.

All drafts are judged on the same text: what the target writes to prompts that nobody trained on, half of them unlike
those (arena_prompts.jsonl: translation, summaries, retrieval), without text after the onset of a loop. A chain's tau is
walked along that text, which is exactly what decoding accepts (tests/parity/test_profile.py); at T = 1 the text is a
sample, and a draft is taken greedily (accepted where it is the token drawn) or sampled (accepted with min(1, q / p)).
The tree 3/4/8 of the last draft is decoded by the embedded engine. `--vllm PROGRAM` has vLLM decode the same prompts
with the last draft of every cell, as it is on disk: chain 3, greedily, loops left out.

Everything lies in --work, a file per cell, so an interrupted arena goes on. The result: benchmarks/results/arena.json,
or arena-RECIPE.json of another target.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from arena_switches import SWITCHES
from safetensors.torch import save_file
from train_throughput import status_bytes
from transformers import AutoConfig

from draftsmith.cli import quiet_libraries
from draftsmith.core import files, run_files
from draftsmith.core.files import JsonObject
from draftsmith.core.recipe import Recipe
from draftsmith.core.recipe_file import load_recipe
from draftsmith.core.records.data import Prompt
from draftsmith.core.records.training import StepTiming
from draftsmith.core.run_files import RunFiles
from draftsmith.core.shape import Shape
from draftsmith.data.regenerate import read_completions
from draftsmith.data.templates import ChatFormat
from draftsmith.data.vocabulary import DraftVocabulary, build_vocabulary
from draftsmith.decoding.sampling import Sampling
from draftsmith.decoding.speculate import Decoder
from draftsmith.decoding.stopping import Ends, loop_onset
from draftsmith.drafts import METHODS
from draftsmith.drafts.directories import ready_draft, write_draft
from draftsmith.drafts.packing import make_pack, trainable
from draftsmith.engines import SERVERS
from draftsmith.engines.base import Setup
from draftsmith.evaluation.acceptance import bootstrap_tau, count
from draftsmith.evaluation.profile import rank_table, walks_of
from draftsmith.hardware.accept_length import MeasuredProfile, SampledProfile
from draftsmith.runs.run import commit, hardware
from draftsmith.targets.base import Capture
from draftsmith.targets.embedded import materialise
from draftsmith.targets.local import LocalTarget
from draftsmith.training.capture import CaptureSource
from draftsmith.training.checkpoints import checkpoint_paths, load_state, load_weights
from draftsmith.training.trainer import Trainer

HERE = Path(__file__).parent
RESULTS, DOCUMENT = HERE / "results", 512
RECIPES: dict[str, JsonObject] = {  # what is changed of them
    # minutes are some 50 steps, not three readings; the text of the first cells
    "smollm2-135m-cpu": {
        "train.on_prompts": False,
        "train.weight_decay": 0.0,
        "regenerate.greedy_share": 0.0,
        "regenerate.max_tokens": 100000,
    },
    # in fp32 for CPUs that multiply no bf16; of the text, what 300 seconds can read
    "gemma3-270m-cpu": {
        "target.dtype": "fp32",
        "train.dtype": "fp32",
        "regenerate.max_tokens": 30000,
        "regenerate.shard_prompts": 96,
    },
}
USUAL_RECIPE = "smollm2-135m-cpu"
SHARES = (0.125, 0.25, 0.5, 1.0)
SPECULATORS = ["--peer", "speculators", "--optimizer", "muon", "--ttt-steps", "3", "--batch", "2"]
PEERS: dict[str, list[str]] = {
    "specforge": ["--peer", "specforge"],
    # their learning rate is meant for a run a thousand times as long, their depth for one served deeper
    "specforge-tuned": ["--peer", "specforge", "--lr", "1e-3", "--ttt-steps", "3"],
    "specforge-3e-3": ["--peer", "specforge", "--lr", "3e-3", "--ttt-steps", "3"],
    "speculators": SPECULATORS,
    "speculators-1e-2": [*SPECULATORS, "--lr", "1e-2"],
}
OURS: dict[str, JsonObject] = {  # one switch each
    "draftsmith": {},
    "lr-2e-3": {"train.learning_rate": 2e-3},
    "lr-8e-3": {"train.learning_rate": 8e-3},
    "pack-512": {"train.pack_tokens": 512, "train.learning_rate": 2e-3},  # twice the steps, so half the rate
    "lk_lambda": {"train.objective": "lk_lambda"},
    "lk_alpha": {"train.objective": "lk_alpha"},
    "true-teacher": {"train.true_probabilities": True},
    "adamw": {"train.optimizer": "adamw", "train.learning_rate": 1e-3},
    "ttt-2": {"train.ttt_steps": 2},
    "ttt-5": {"train.ttt_steps": 5},
    "ttt-7": {"train.ttt_steps": 7},
    "decay-0.4": {"train.step_decay": 0.4},  # nearer to the chance that a depth is reached
    "taps-even": {"draft.taps": [7, 15, 23]},
    "taps-late": {"draft.taps": [9, 19, 29]},
    "no-fc-norm": {"draft.fc_norm": False, "train.learning_rate": 8e-3},  # not fitted, so the rate of random starts
    "on-prompts": {"train.on_prompts": True},
    "weight-decay": {"train.weight_decay": 1.0},
    "head-rate-1": {"train.head_rate": 1.0},
    "head-still": {"train.head_rate": 1e-6},  # what a step would save by freezing it is not taken off
    "wide": {"draft.intermediate_size": 3072},  # twice the target's
    "vocab-4096": {"vocab.size": 4096},
    "vocab-16384": {"vocab.size": 16384},
}
USUAL = ("draftsmith", *PEERS)
CHAIN, TREE, LIKE = Shape.chain(3), Shape(3, 4, 8), ("chat", "code", "math")
PROMPTS, WRITTEN, DECODED = 8, 96, 48  # of each category; tokens of an answer, of one that a tree decodes
SHORTEST = 12  # tokens of a text that is judged


def recipe_of(name: str, seed: int, changed: JsonObject) -> Recipe:
    """The recipe with what is changed, by dotted keys."""
    given: JsonObject = {}
    for key, value in {"train.capture": "online", "train.epochs": 100, **RECIPES[name], **changed}.items():
        section, setting = key.split(".")
        given.setdefault(section, {})[setting] = value
    return load_recipe(recipe_path(name), {"seed": seed, **given})


def recipe_path(name: str) -> Path:
    return HERE.parent / "recipes" / f"{name}.yaml"


# --- the frozen text ----------------------------------------------------------------------------------------------


def write_completions(name: str, run: RunFiles) -> None:
    flags = [
        part
        for key, value in RECIPES[name].items()
        if not key.startswith("train.")
        for part in (f"--{key.replace('_', '-')}", str(value))
    ]
    for stage in ("prompts", "regenerate", "vocab"):
        command = [sys.executable, "-m", "draftsmith", stage, str(recipe_path(name)), *flags]
        subprocess.run([*command, "--out", str(run.root)], check=True)


def write_peers_data(run: RunFiles, path: Path) -> None:
    """The completions that training takes, one document a row."""
    rows = [c for c in read_completions(run.completions) if trainable(c, DOCUMENT)]
    ids, mask = torch.zeros(len(rows), DOCUMENT, dtype=torch.long), torch.zeros(len(rows), DOCUMENT, dtype=torch.long)
    for number, row in enumerate(rows):
        kept = row.ids[:DOCUMENT]
        ids[number, : len(kept)] = torch.tensor(kept)
        for start, end in row.spans:
            mask[number, start:end] = 1
    lengths = torch.tensor([min(len(row.ids), DOCUMENT) for row in rows])
    vocabulary = DraftVocabulary.load(run.vocabulary)
    maps = {"d2t": vocabulary.d2t, "t2d": vocabulary.t2d}
    save_file({"input_ids": ids, "loss_mask": mask, "lengths": lengths, **maps}, path)


def write_texts(recipe: Recipe, run: RunFiles, target: LocalTarget, path: Path) -> None:
    """What the target writes to the evaluation prompts, greedily and at T = 1."""
    known = list(Prompt.read_rows(run.evaluation_prompts))
    prompts = [(p.category, p.users[0]) for c in LIKE for p in [p for p in known if p.category == c][:PROMPTS]]
    rows = map(json.loads, (HERE / "arena_prompts.jsonl").read_text().splitlines())
    prompts += [(row["category"], row["prompt"]) for row in rows]
    chat = ChatFormat.of(recipe, target)
    asked = [list(chat.first_turn(text)) for _, text in prompts]
    told: JsonObject = {"prompts": [[category, ids] for (category, _), ids in zip(prompts, asked, strict=True)]}
    for name, sampling in (("greedy", Sampling()), ("drawn", Sampling(1.0))):
        answers = dict(target.generate(asked, sampling, WRITTEN, stop_loops=True))
        told[name] = [answers[i].ids[: loop_onset(answers[i].ids)] for i in range(len(asked))]
    files.write_json(path, told)


# --- training -----------------------------------------------------------------------------------------------------


def vocabulary_of(recipe: Recipe, run: RunFiles, target: LocalTarget, cell: Path) -> DraftVocabulary:
    """The run's, which the peers have, too; of another size where the cell asks for one."""
    held = DraftVocabulary.load(run.vocabulary)
    if recipe.vocab.size == len(held.ids_D):
        return held
    special = {*target.tokenizer.all_special_ids, *target.eos_ids}
    return build_vocabulary(recipe, run.completions, target.identity.vocab_size, special, RunFiles(cell))


def count_fit(trainer: Trainer) -> list[float]:
    """[CPU seconds, seconds] of what it solves for before the first step, filled in by then."""
    spent, fit = [0.0, 0.0], trainer._fit

    def counted(capture: CaptureSource) -> None:
        started = time.process_time(), time.perf_counter()
        fit(capture)
        spent[:] = time.process_time() - started[0], time.perf_counter() - started[1]

    trainer._fit = counted
    return spent


def train_ours(recipe_name: str, work: Path, cell: Path, name: str, seed: int, seconds: float) -> None:
    """The train stage's own trainer, on the completions of the run; the seed is that of training alone."""
    changed, (_, prepare) = OURS.get(name, {}), SWITCHES.get(name, ("", None))
    run, asked = RunFiles(work / "run"), recipe_of(recipe_name, seed, changed)
    target = LocalTarget(asked.target)
    for parameter in target.lm.parameters():
        parameter.sum()  # weights are memory-mapped: touch them, so that they count as the target's
    after_target, vocabulary = status_bytes("VmRSS"), vocabulary_of(asked, run, target, cell)

    def trainer(out: Path, **more: int) -> Trainer:
        recipe = recipe_of(recipe_name, seed, {**changed, **{f"train.{key}": value for key, value in more.items()}})
        return Trainer(recipe, target, run.completions, vocabulary, out)

    trial = trainer(cell / "trial", max_steps=14)
    capture, spent = trial._capture_source(), []
    for [indices] in trial.steps:
        started = time.process_time()
        trial._optimiser_step([make_pack([trial.rows[i] for i in indices])], capture)
        spent.append(time.process_time() - started)
    shares = len(SHARES) * 2  # the first of SHARES is one of them
    fitting = count_fit(trial)
    if not name.startswith("init"):
        trial._fit(capture)
    every = max(1, round((seconds - fitting[0]) / statistics.mean(spent[2:]) / shares))
    del trial
    steps = every * shares
    kept = {"checkpoint_every": every, "keep_checkpoints": shares}
    training = trainer(cell / "train", max_steps=steps, evaluate_every=steps, **kept)
    fitting = count_fit(training)
    if prepare:
        prepare(training)
    training.train()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    timings = list(StepTiming.read_rows(cell / "train" / run_files.STEP_TIMING))
    drafts = []
    for path in checkpoint_paths(cell / "train"):
        state = load_state(path)
        share = state.step / (every * shares)
        if share not in SHARES:
            continue
        draft = METHODS[state.belongs.method].build(training.draft.config)
        load_weights(path, draft)
        write_draft(cell / "drafts" / str(share), draft, vocabulary.ids_D, target.identity.num_layers, {})
        done = timings[: state.step]
        summed = {"tokens": sum(t.tokens for t in done), "wall_s": fitting[1] + sum(t.seconds for t in done)}
        drafts.append({"share": share, **summed, "cpu_s": fitting[0] + sum(t.cpu_seconds or 0.0 for t in done)})
    told = {"version": commit(), "steps": every * shares, "above_target_bytes": peak - after_target}
    files.write_json(cell / "train.json", {**told, "drafts": drafts})


def train_peer(recipe: Recipe, work: Path, cell: Path, name: str, seed: int, seconds: float, python: Path) -> None:
    """With a layer of the shape that ours has."""
    directory = materialise(recipe.target.model)
    config = AutoConfig.from_pretrained(directory).get_text_config()
    shape = METHODS[recipe.draft.method].config(recipe.draft, config, config.num_hidden_layers, recipe.vocab.size)
    same = ["hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim"]
    layer = {key: getattr(shape, key) for key in (*same, "rope_theta", "max_position_embeddings", "taps")}
    layer |= {"rms_norm_eps": config.rms_norm_eps, "pad_token_id": config.pad_token_id}
    command = [str(python), str(HERE / "peers.py"), *PEERS[name], "--dtype", "fp32", "--seq", str(DOCUMENT)]
    command += ["--layer", json.dumps(layer), "--data", str(work / "data.safetensors")]
    command += ["--target", str(directory)]
    if config.model_type.startswith("gemma"):
        command += ["--gemma-norm"]
    command += ["--seconds", str(seconds), "--seed", str(seed), "--shares", *map(str, SHARES)]
    done = subprocess.run([*command, "--save", str(cell / "drafts")], capture_output=True, text=True, env=environment())
    if done.returncode:
        sys.exit(f"{name}, seed {seed}: {done.stderr[-2000:]}")
    told = json.loads(done.stdout.strip().splitlines()[-1])
    drafts = [
        {"share": d["share"], "tokens": d["tokens"], "wall_s": d["target_s"] + d["draft_s"], "cpu_s": d["cpu_s"]}
        for d in told["drafts"]
    ]
    memory = told["peak_rss_bytes"] - told["rss_after_target_load_bytes"]
    about = {"version": told["version"], "steps": told["steps"] + 1, "above_target_bytes": memory}
    files.write_json(cell / "train.json", {**about, "drafts": drafts})


def environment() -> dict[str, str]:
    """For all systems: allocator.py's settings; threads wait without spinning, so CPU seconds are work."""
    kept = {
        "OMP_WAIT_POLICY": "PASSIVE",
        "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
        "MALLOC_TRIM_THRESHOLD_": str((1 << 31) - 1),
    }
    return {**os.environ, "OMP_NUM_THREADS": str(os.cpu_count()), "TOKENIZERS_PARALLELISM": "false", **kept}


# --- judging ------------------------------------------------------------------------------------------------------


def remember_captures(target: LocalTarget) -> None:
    """The judged text is the same for all drafts, and its hidden states cost more than all that is done with them."""
    known: dict[tuple, Capture] = {}
    capture = target.capture

    def once(documents: list[list[int]], taps: tuple[int, ...]) -> Capture:
        key = (tuple(map(tuple, documents)), tuple(taps))
        if key not in known:
            known[key] = capture(documents, taps)
        return known[key]

    target.capture = once


def judge(target: LocalTarget, draft: Path, texts: JsonObject, tree: bool) -> JsonObject:
    """tau of a draft by way of drafting and kind of prompt."""
    ready, told = ready_draft(target, draft, "auto"), {}
    groups = {"like": set(LIKE), "unlike": {c for c, _ in texts["prompts"]} - set(LIKE)}
    groups |= {category: {category} for category, _ in texts["prompts"]}
    for name, sampling in (("greedy", Sampling()), ("drawn", Sampling(1.0))):
        chosen = [
            (category, (asked, written))
            for (category, asked), written in zip(texts["prompts"], texts[name], strict=True)
            if len(written) >= SHORTEST
        ]
        walks, chances = walks_of(target, ready, [text for _, text in chosen], sampling)
        for group, categories in {"all": set().union(*groups.values()), **groups}.items():
            inside = [i for i, (category, _) in enumerate(chosen) if category in categories]
            ways = told.setdefault(group, {})
            ways["T=0" if sampling.greedy else "T=1 greedy"] = MeasuredProfile([walks[i] for i in inside]).tau(CHAIN)
            if chances:
                ways["T=1 sampled"] = SampledProfile([chances[i] for i in inside]).tau(CHAIN)
        if sampling.greedy:
            told["depths"] = [row[0] for row in rank_table(walks)]
    if tree:
        decoder, ends, rows = Decoder(target, ready.drafter()), Ends(target.eos_ids), []
        for category, asked in texts["prompts"]:
            answer = decoder.generate(asked, Sampling(), DECODED, TREE, ends=ends)
            rows.append(count("", category, answer, TREE.steps))
        tau = bootstrap_tau([row.accepted for row in rows], [row.steps for row in rows])
        told["tree"] = tau.model_dump(mode="json")
    return told


def judge_on_vllm(recipe: Recipe, draft: Path, texts: JsonObject, program: str) -> JsonObject:
    """tau of the chain as vLLM decodes it; the engine's log lies beside the draft."""
    serve = recipe.serve.model_copy(
        update={"program": program, "context": 1024, "extra": "--enforce-eager --max-num-seqs 16"}
    )
    server = recipe.server.model_copy(update={"concurrency": 16})
    setup = Setup(recipe.model_copy(update={"serve": serve, "server": server}), draft, draft.parent)
    with SERVERS["vllm"].open(setup, CHAIN) as session:
        asked = [ids for _, ids in texts["prompts"]]
        answers = dict(session.generate(asked, Sampling(), WRITTEN))
    rows = [count("", category, answers[i], CHAIN.steps) for i, (category, _) in enumerate(texts["prompts"])]
    return bootstrap_tau([row.accepted for row in rows], [row.steps for row in rows]).model_dump(mode="json")


# --- all of it ----------------------------------------------------------------------------------------------------


def cells(work: Path, systems: list[str], seeds: list[int], seconds: float) -> Iterator[tuple[str, int, Path]]:
    for seed in seeds:
        for name in systems:
            yield name, seed, work / f"{seconds:g}" / f"{name}-{seed}"


def result(work: Path, seconds: float, command: str, last: Path) -> JsonObject:
    """Every cell that is there, whoever asked for it, and those of the last result on the same text."""
    rows = []
    for path in sorted((work / f"{seconds:g}").glob("*/judged-*.json")):
        name, _, seed = path.parent.name.rpartition("-")
        trained = files.read_json(path.parent / "train.json")
        share = float(path.stem.removeprefix("judged-"))
        point = next(d for d in trained["drafts"] if d["share"] == share)
        about = {"system": name, "seed": int(seed), "version": trained["version"], "steps": trained["steps"]}
        about["above_target_bytes"] = trained["above_target_bytes"]
        about["changed"] = {SWITCHES[name][0]: ""} if name in SWITCHES else OURS.get(name, {})
        tau, served = files.read_json(path), path.parent / f"vllm-{path.stem.removeprefix('judged-')}.json"
        if served.exists():
            tau["vllm"] = files.read_json(served)
        rows.append({**about, **point, "tau": tau})
    made = {"commit": commit(), "command": command, "hardware": hardware().model_dump(mode="json")}
    texts, run = files.read_json(work / "texts.json"), RunFiles(work / "run")
    data = {
        "completions": files.digest(*run_files.shards(run.completions)),
        "completion_tokens": files.read_json(run.completions / run_files.SUMMARY)["completion_tokens"],
        "prompts": len(texts["prompts"]),
        "judged_tokens": {name: sum(map(len, texts[name])) for name in ("greedy", "drawn")},
    }
    known = files.read_json(last) if last.exists() else None
    if known and (known["data"], known["seconds"]) == (data, seconds):
        anew = {(row["system"], row["seed"]) for row in rows}
        rows += [row for row in known["rows"] if (row["system"], row["seed"]) not in anew]
        rows.sort(key=lambda row: (row["system"], row["seed"], row["share"]))
    return {**made, "seconds": seconds, "data": data, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", choices=list(RECIPES), default=USUAL_RECIPE, help="of the target and its text")
    parser.add_argument("--peers", type=Path, default=Path(".peers-venv"), help="virtual environment of the peers")
    parser.add_argument("--seconds", type=float, default=300.0, help="CPU seconds of training for everyone")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--only", nargs="+", choices=[*PEERS, *OURS, *SWITCHES], default=list(USUAL), metavar="SYSTEM")
    parser.add_argument("--vllm", metavar="PROGRAM", help="what starts vLLM; it judges the last drafts, too")
    parser.add_argument("--work", type=Path, help="default: runs/arena, runs/arena-RECIPE of another recipe")
    parser.add_argument("--ours", type=Path, metavar="CELL", help="train one cell of ours in this process")
    options = parser.parse_args()
    quiet_libraries()
    of_recipe = "arena" if options.recipe == USUAL_RECIPE else f"arena-{options.recipe}"
    work, out = options.work or Path("runs") / of_recipe, RESULTS / f"{of_recipe}.json"
    if options.ours:
        [name], [seed] = options.only, options.seeds
        train_ours(options.recipe, work, options.ours, name, seed, options.seconds)
        return
    run, recipe = RunFiles(work / "run"), recipe_of(options.recipe, 1, {})
    if not run.vocabulary.exists():
        write_completions(options.recipe, run)
    if not (work / "data.safetensors").exists():
        write_peers_data(run, work / "data.safetensors")
    for name, seed, cell in cells(work, options.only, options.seeds, options.seconds):
        if (cell / "train.json").exists():
            continue
        print(f"arena: {name}, seed {seed}, {options.seconds:g} CPU seconds", flush=True)
        if name in PEERS:
            train_peer(recipe, work, cell, name, seed, options.seconds, options.peers / "bin" / "python")
        else:
            command = [sys.executable, __file__, "--recipe", options.recipe, "--work", str(work)]
            command += ["--seconds", str(options.seconds), "--only", name, "--seeds", str(seed), "--ours", str(cell)]
            subprocess.run(command, check=True, env=environment())
    target = LocalTarget(recipe.target)
    if not (work / "texts.json").exists():
        write_texts(recipe, run, target, work / "texts.json")
    texts = files.read_json(work / "texts.json")
    remember_captures(target)
    for name, seed, cell in cells(work, options.only, options.seeds, options.seconds):
        for share in (point["share"] for point in files.read_json(cell / "train.json")["drafts"]):
            path = cell / f"judged-{share}.json"
            if not path.exists():
                files.write_json(path, judge(target, cell / "drafts" / str(share), texts, tree=share == SHARES[-1]))
            told = files.read_json(path)["all"]
            ways = ", ".join(f"{way} {tau:.3f}" for way, tau in told.items())
            print(f"{name}-{seed} at {share:g}: {ways}", flush=True)
            served = cell / f"vllm-{share}.json"
            if options.vllm and share == SHARES[-1] and not served.exists():
                files.write_json(served, judge_on_vllm(recipe, cell / "drafts" / str(share), texts, options.vllm))
                print(f"{name}-{seed} on vLLM: {files.read_json(served)['tau']:.3f}", flush=True)
    command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
    files.write_json(out, result(work, options.seconds, command, out))


if __name__ == "__main__":
    main()
