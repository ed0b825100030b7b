"""What an error says to do about a key, a flag, a row or a file is done, and then it works.

What is given is read out of the error itself, so a key or name that is wrong there fails here.
"""

import json
import math
import shutil
import sys
from collections import Counter
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from models import read_source, save_tiny_target, tiny_lm, tiny_recipe, tiny_target, tiny_tokenizer
from outcomes import read, told

from draftsmith import cli
from draftsmith.core.recipe_file import dump_recipe, parse_recipe
from draftsmith.core.records.data import Prompt
from draftsmith.core.sources import EvaluationSet, Source
from draftsmith.data.licences import licence_of
from draftsmith.data.regenerate import open_conversations
from draftsmith.data.sets import read_set
from draftsmith.data.templates import ChatFormat
from draftsmith.data.vocabulary import choose
from draftsmith.drafts import METHODS
from draftsmith.runs.plan import source_size
from draftsmith.runs.run import Run
from draftsmith.targets.identity import require_same_logprobs, weights_hash
from draftsmith.targets.parts import resolve_device, tell_slow_products

# --- recipes ----------------------------------------------------------------------------------------------------------

LEFT_OUT = object()
HAND = {"user": "Q: {content} A:"}
RECIPES = {  # (what is wrong, what is read out of the error, what it says to give)
    "a template without content": (
        {"target.template": {"user": "Q:"}},
        r"(target\.template\.user): 'Q:' does not contain (\S+)$",
        lambda key, needed: {key: f"Q: {needed}"},
    ),
    "options beside a template": (
        {"target.template": HAND, "target.template_options": {"thinking": True}},
        r"(target\.\w+): given beside target\.template, .*; leave one of them out",
        lambda key: {"target.template": HAND, key: {}},
    ),
    "a template beside options": (
        {"target.template": HAND, "target.template_options": {"thinking": True}},
        r"given beside (target\.template), .*; leave one of them out",
        lambda key: {key: None, "target.template_options": {"thinking": True}},
    ),
    "taps in any order": ({"draft.taps": [4, 1]}, r"(draft\.\w+): .* must be ascending", lambda key: {key: [1, 4]}),
    "one norm": (
        {"draft.norm_before_fc": True, "draft.fc_norm": True},
        r"(draft\.\w+) and (draft\.\w+): choose one",
        lambda one, other: {one: True, other: False},
    ),
    "the other norm": (
        {"draft.norm_before_fc": True, "draft.fc_norm": True},
        r"(draft\.\w+) and (draft\.\w+): choose one",
        lambda one, other: {one: False, other: True},
    ),
    "a set twice": (
        {"evaluate.sets": ["gsm8k", "gsm8k"]},
        r"(evaluate\.sets): (\w+) is given twice; give one of them another name and a path",
        lambda key, name: {key: [name, {"name": f"{name}-2", "path": "x"}]},
    ),
    "a set that nobody knows": (
        {"evaluate.sets": ["mine"]},
        r"^test: (evaluate\.sets)\.0: .*give yours a path: ({.*})$",
        lambda key, given: {key: [yaml.safe_load(given)]},
    ),
    "sets that are known": (
        {"evaluate.sets": ["mine"]},
        r"^test: (evaluate\.sets)\.0: .* known are (.*), speed-bench, or give",
        lambda key, names: {key: names.split(", ")},
    ),
    "a set without a path": (
        {"evaluate.sets": ["speed-bench"]},
        r"^test: (evaluate\.sets)\.0: .* and give ({.*})$",
        lambda key, given: {key: [yaml.safe_load(given)]},
    ),
    "a key that is none": (
        {"train.epoch": 2},
        r"(train)\.epoch: unknown key; did you mean '(\w+)'\?",
        lambda part, key: {"train.epoch": LEFT_OUT, f"{part}.{key}": 2},
    ),
    "a password": (
        {"server.urls": ["http://me:secret@host"], "target.engine": "vllm"},
        r"^test: (server\.urls)\.0: .* environment variable that (server\.\w+) names$",
        lambda key, variable: {key: ["http://host"], variable: "OUR_KEY"},
    ),
    "a password somewhere else": (
        {"serve.extra": "--webhook http://me:secret@host"},
        r"^test: (serve\.extra): .* environment variable that (server\.\w+) names$",
        lambda key, variable: {key: "--webhook http://host", variable: "OUR_KEY"},
    ),
    "a key for its variable": (
        {"server.api_key_env": "sk-abc"},
        r"(server\.\w+): is to name an environment variable, in capitals such as (\w+),",
        lambda key, name: {key: name},
    ),
    "a key in flags": (
        {"serve.extra": "--api-key abc"},
        r"(serve\.\w+): (--\S+): write (\$NAME),",
        lambda key, flag, name: {key: f"{flag} {name}"},
    ),
    "no URL": (
        {"evaluate.url": "localhost:8000"},
        r"(evaluate\.url): .* is like (http:\S+) or ",
        lambda key, url: {key: url.replace("HOST", "localhost").replace("PORT", "8000")},
    ),
    "no URL of the other kind": (
        {"evaluate.url": "localhost:8000"},
        r"(evaluate\.url): .* or (https:\S+)$",
        lambda key, url: {key: url},
    ),
    "no shape": ({"serve.shape": "3-4"}, r"(serve\.shape): .* such as (\S+)$", lambda key, shape: {key: shape}),
    "no chain": (
        {"serve.shape": "3/1/9"},
        r"(serve\.shape): .* a chain of (\d) steps verifies (\d) tokens",
        lambda key, steps, tokens: {key: f"{steps}/1/{tokens}"},
    ),
    "no tree": (
        {"serve.shape": "2/4/99"},
        r"(serve\.shape): .* (\d) steps of top-k (\d) verify 2 to (\d+) tokens",
        lambda key, steps, topk, tokens: {key: f"{steps}/{topk}/{tokens}"},
    ),
    "a shape of nothing": (
        {"serve.shape": "0/1/1"},
        r"(serve\.shape): .* steps and top-k are at least (1)$",
        lambda key, least: {key: f"{least}/{least}/2"},
    ),
}


@pytest.mark.parametrize("case", RECIPES)
def test_a_recipe_is_mended_as_it_is_told(case):
    wrong, pattern, mend = RECIPES[case]
    found = read(pattern, told(tiny_recipe, "m", "p", **wrong))
    changes = wrong | mend(*([found] if isinstance(found, str) else found))
    assert tiny_recipe("m", "p", **{key: value for key, value in changes.items() if value is not LEFT_OUT}).name


def test_a_key_that_is_missing_is_given():
    values = {"target": {}}
    for _ in range(2):
        *parents, last = read(r"^test: (\S+): missing; give it a value", told(parse_recipe, values, "test")).split(".")
        for part in parents:
            assert part in values
        (values[parents[0]] if parents else values)[last] = "x"
    assert parse_recipe(values, "test").target.model == "x"


# --- commands and flags -----------------------------------------------------------------------------------------------


@pytest.fixture
def recipe_file(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_recipe(tiny_recipe("m", "p")))
    return str(path)


FLAGS = {  # (words, what is read out of the error, the words that it says to give)
    "a command": (["trian", "R"], r"did you mean (\w+)\?", lambda name: [name, "R"]),
    "a key": (["train", "R", "--train.epoch", "2"], r"did you mean (\S+)\?", lambda flag: ["train", "R", flag, "2"]),
    "a flag": (["run", "R", "--dry"], r"did you mean (\S+)\?", lambda flag: ["run", "R", flag]),
    "no recipe": (["run"], r"usage: draftsmith (\w+) RECIPE \[flags\]", lambda name: [name, "R"]),
    "no model": (["init"], r"usage: draftsmith (\w+) MODEL \[flags\]", lambda name: [name, "R"]),
    "no directory": (["inspect"], r"usage: draftsmith (\w+) DIRECTORY \[flags\]", lambda name: [name, "R"]),
}


@pytest.mark.parametrize("case", FLAGS)
def test_a_command_line_is_mended_as_it_is_told(recipe_file, case):
    words, pattern, mend = FLAGS[case]

    def parse(words):
        return cli.parse([recipe_file if word == "R" else word for word in words])

    found = read(pattern, told(parse, words))
    command, recipe = parse(mend(found))
    assert found in (words[0], "train") or recipe.train.epochs == 2 or command.dry_run


@pytest.mark.parametrize("words", [["predict", "R", "--tau"], ["nonsense", "R"]])
def test_what_is_said_to_list_them_lists_them(recipe_file, monkeypatch, capsys, words):
    words = [recipe_file if word == "R" else word for word in words]
    advised = read(r"draftsmith ([\w -]+) lists ", told(cli.parse, words)).split()
    monkeypatch.setattr(sys, "argv", ["draftsmith", *advised])
    if len(advised) == 1:
        assert cli.main() == 0
        assert {"train", "serve"} <= set(capsys.readouterr().out.split())
    else:
        with pytest.raises(SystemExit):  # argparse prints and leaves
            cli.main()
        assert {"--tau", "--train.epochs"} <= set(capsys.readouterr().out.split())


# --- prompts and sets -------------------------------------------------------------------------------------------------


def rows_file(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def prompts_in(skip_bad=False, **source):
    return [prompt.users[0] for prompt in read_source(Source(**source), 1, skip_bad, 0)[0]]


def test_a_source_is_one_of_those_that_are_allowed(tmp_path, monkeypatch):
    monkeypatch.setattr("draftsmith.data.sources._streamed", lambda *_: iter([("1", {"prompt": "hi", "input": "hi"})]))
    line = told(prompts_in, name="nothing.jsonl")
    names, kinds, hub = read(
        r"allowed are (.*), a path to (.*) \(packed as .*, or a data set on the hub as (.*)$", line
    )
    for name in names.split(", "):
        assert prompts_in(name=name)
    assert prompts_in(name=hub.split("[")[0]) == ["hi"]
    table = datasets.Dataset.from_list([{"prompt": "hi"}])
    for kind in kinds.split(", "):
        path = tmp_path / f"rows{kind}"
        path.write_text({".csv": "prompt\nhi\n", ".tsv": "prompt\nhi\n", ".txt": "hi\n"}.get(kind, '{"prompt": "hi"}'))
        if kind == ".parquet":
            table.to_parquet(str(path))
        if kind == ".arrow":
            table.save_to_disk(str(tmp_path / "saved"))
            shutil.copy(next((tmp_path / "saved").glob("*.arrow")), path)
        columns = {"prompt": "text"} if kind == ".txt" else {}
        assert prompts_in(name=str(path), columns=columns) == ["hi"], kind


ROWS = {  # (rows, options of the source, what is read out of the error, the options that it says to give)
    "keys that nobody knows": (
        [{"my_text": "a b", "n": 1}],
        {},
        r"\(found: (\w+), n\); name yours in the source's (columns);",
        lambda found, key: {key: {"prompt": found}},
    ),
    "a column that is none": (
        [{"my_text": "a b"}],
        {"columns": {"prompt": "text"}},
        r"(columns): prompt: 'text' is no column \(found: (\w+)\)",
        lambda key, found: {key: {"prompt": found}},
    ),
    "a column that no row has": (
        [{"prompt": "a b", "persona": "c"}],
        {"columns": {"system": "who"}},
        r"(columns): (\w+): 'who' is no column; found are prompt, (\w+)$",
        lambda key, ours, found: {key: {ours: found}},
    ),
    "no prompts": (
        [{"messages": [], "my_text": "a b"}],
        {},
        r"keys found: messages, (\w+)\); give another source, or name its columns with (columns)$",
        lambda found, key: {key: {"prompt": found}},
    ),
    "a bad row": (
        [{"my_text": "a b"}, {"prompt": "a b"}],
        {},
        r"; mend the line or pass --prompts\.(skip-bad)$",
        lambda flag: {flag.replace("-", "_"): True},
    ),
}


@pytest.mark.parametrize("case", ROWS)
def test_a_source_is_mended_as_it_is_told(tmp_path, case):
    rows, wrong, pattern, mend = ROWS[case]
    name = rows_file(tmp_path / "rows.jsonl", *rows)
    found = read(pattern, told(prompts_in, name=name, **wrong))
    assert prompts_in(name=name, **wrong | mend(*([found] if isinstance(found, str) else found))) == ["a b"]


def test_the_line_that_is_named_is_mended(tmp_path):
    name = rows_file(tmp_path / "rows.jsonl", {"prompt": "a"}, {"prompt": 7}, {"prompt": "c"})
    path, number = read(r"^(\S+):(\d+): .*; mend the line or ", told(prompts_in, name=name))
    lines = Path(path).read_text().splitlines()
    lines[int(number) - 1] = '{"prompt": "b"}'
    Path(path).write_text("\n".join(lines))
    assert prompts_in(name=name) == ["a", "b", "c"]


def test_a_file_is_saved_as_it_is_told(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "w\u00e4rme"}', "utf-16")
    encoding = read(r"is UTF-16; save it as (\S+)$", told(prompts_in, name=str(path)))
    path.write_text(path.read_text("utf-16"), encoding)
    assert prompts_in(name=str(path)) == ["w\u00e4rme"]


def test_a_split_of_the_hub_is_named_as_it_is_told(monkeypatch):
    def load(path, config, split, streaming, revision):
        rows = datasets.Dataset.from_list([{"prompt": f"{config} {split}"}]).to_iterable_dataset()
        return rows if split else {"alone": rows, "together": rows}

    monkeypatch.setattr(datasets, "load_dataset", load)
    for name in ("owner/set", "owner/set:small"):
        advised = read(r"name one, as in (\S+)$", told(prompts_in, name=name))
        assert prompts_in(name=advised) == [f"{name.partition(':')[2] or None} alone"]


def asked_in(tmp_path, skip_bad=False, **chosen):
    found = read_set(EvaluationSet(**chosen), tmp_path / "none", tmp_path / "sets", skip_bad)
    return [prompt.users[0] for prompt in found.prompts]


def test_a_set_is_given_as_it_is_told(tmp_path, monkeypatch):
    def lost(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", lost)
    own = rows_file(tmp_path / "gsm8k.jsonl", {"question": "1 + 1?", "answer": "2"})
    # of the hub: as a file
    line = told(asked_in, tmp_path, name="gsm8k")
    given = yaml.safe_load(read(r"where there is no network give it as a file: ({.*})$", line).replace("FILE", own))
    assert asked_in(tmp_path, **given) == ["1 + 1?"]
    # of a file that is none: a folder that has one
    (tmp_path / "folder").mkdir()
    line = told(asked_in, tmp_path, name="gsm8k", path=tmp_path / "folder")
    kinds = read(r"no folder that has (.*) files in it; give such a path", line)
    shutil.copy(own, tmp_path / "folder" / f"x{kinds.replace(' or', ',').split(', ')[1]}")
    assert asked_in(tmp_path, name="gsm8k", path=tmp_path / "folder") == ["1 + 1?"]
    # of other rows: the set's own file, columns, or fewer rows
    other = rows_file(tmp_path / "other.jsonl", {"q": "1 + 1?"}, {"question": "2 + 2?", "answer": "4"})
    line = told(asked_in, tmp_path, name="gsm8k", path=other)
    key, flag = read(r"give the set's own file, name its (columns), or pass --prompts\.(skip-bad)$", line)
    assert asked_in(tmp_path, name="gsm8k", path=own) == ["1 + 1?"]
    assert asked_in(tmp_path, name="gsm8k", path=other, **{flag.replace("-", "_"): True}) == ["2 + 2?"]
    other = rows_file(tmp_path / "columns.jsonl", {"q": "1 + 1?"})
    assert asked_in(tmp_path, name="gsm8k", path=other, **{key: {"question": "q"}}) == ["1 + 1?"]
    # of nothing to ask: another path
    empty = rows_file(tmp_path / "empty.jsonl", {"question": "", "answer": ""})
    line = told(asked_in, tmp_path, name="gsm8k", path=empty)
    assert asked_in(tmp_path, **{"name": "gsm8k", read(r"give another (path), or leave it out$", line): own}) == [
        "1 + 1?"
    ]


# --- targets ----------------------------------------------------------------------------------------------------------


def test_the_template_that_is_given_as_an_example_asks():
    target = tiny_target()
    target.tokenizer = tiny_tokenizer(None)
    line = told(ChatFormat.of, tiny_recipe("m", "p"), target)
    key, example = read(r"^(target\.\w+): .* give one, for example ({.*})$", line)
    chat = ChatFormat.of(tiny_recipe("m", "p", **{key: yaml.safe_load(example)}), target)
    assert target.tokenizer.decode(chat.first_turn("w1 w2")).split()
    assert chat.stop == ("\nUser:",)


def test_a_prompt_that_the_template_refuses_is_mended_or_left_out():
    target = tiny_target(
        tokenizer=tiny_tokenizer("{{ raise_exception('no') if 'w1' in messages[0].content else 'w2' }}")
    )
    chat = ChatFormat.of(tiny_recipe("m", "p"), target)

    def opened(*texts, **options):
        prompts = [
            Prompt(id=text, category="x", source="x", messages=[{"role": "user", "content": text}]) for text in texts
        ]
        return [conversation.prompt.id for conversation in open_conversations(prompts, chat, 100, **options)]

    name, flag = read(r"^prompt '(.*)': .*; mend it or pass --prompts\.([\w-]+)$", told(opened, "w2", "w1", "w3"))
    assert opened(*("w4" if text == name else text for text in ("w2", "w1", "w3"))) == ["w2", "w4", "w3"]
    assert opened("w2", "w1", "w3", **{flag.replace("-", "_"): True}) == ["w2", "w3"]


def test_a_vocabulary_has_the_size_that_is_told():
    counts, always = Counter({5: 3, 9: 1}), {0, 1, 2}
    most = read(r"larger than the target's vocabulary of (\d+)$", told(choose, counts, 999, 64, always))
    assert len(choose(counts, int(most), 64, always).ids_D) == 64
    least = read(r"too small for the target's (\d+) special tokens$", told(choose, counts, 2, 64, always))
    assert choose(counts, int(least), 64, always).ids_D.tolist() == sorted(always)


LAYERS = {  # (layers of the target, the recipe's draft, what is read out of the error, what it says to give)
    "no default taps": (4, {}, r"^(draft\.taps): .* no default taps; name them$", lambda key: {key: [1, 2, 3]}),
    "a tap beyond": (
        6,
        {"draft.taps": [1, 3, 6]},
        r"^(draft\.taps): 6 given; the target has layers (0)\.\.(5)$",
        lambda key, first, last: {key: [int(first), 3, int(last)]},
    ),
    "heads": (
        6,
        {"draft.taps": [1, 3, 4], "draft.num_attention_heads": 3},
        r"^(draft\.\w+): 3 is no multiple of (num_key_value_heads) (\d)$",
        lambda heads, kv, count: {"draft.taps": [1, 3, 4], heads: 2 * int(count), f"draft.{kv}": int(count)},
    ),
}


@pytest.mark.parametrize("case", LAYERS)
def test_a_draft_fits_its_target_as_it_is_told(case):
    layers, wrong, pattern, mend = LAYERS[case]

    def config(changes):
        recipe = tiny_recipe("m", "p", **{"draft": {}} | changes)
        return METHODS["eagle3"].config(recipe.draft, tiny_lm().config, layers, 40)

    found = read(pattern, told(config, wrong))
    assert config(wrong | mend(*([found] if isinstance(found, str) else found))).draft_vocab_size == 40


def test_a_device_is_one_of_those_that_are_told():
    for wrong, pattern in (("cuda", r"; use (.*) or (.*)$"), ("gpu", r"; allowed are (auto), (cpu), ")):
        for device in read(pattern, told(resolve_device, wrong)):
            assert resolve_device(device).type == "cpu"


def test_code_of_its_own_runs_where_that_is_told_to_allow_it(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    model = tmp_path / "model"
    save_tiny_target(model)
    values = json.loads((model / "config.json").read_text())
    values |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}
    (model / "config.json").write_text(json.dumps(values))
    (model / "own.py").write_text(
        "from transformers import LlamaConfig\n\n\nclass Own(LlamaConfig):\n    model_type = 'own'\n"
    )
    (tmp_path / "recipe.yaml").write_text(dump_recipe(tiny_recipe(str(model), "p")))
    words = ["plan", str(tmp_path / "recipe.yaml")]

    def config(recipe):
        return Run(recipe, tmp_path / "run", ["test"]).target_config

    line = told(config, cli.parse(words)[1])
    key, value, flag = read(r", which (target\.\w+): (\w+) \((--\S+)\) lets run here$", line)
    for recipe in (tiny_recipe(str(model), "p", **{key: yaml.safe_load(value)}), cli.parse([*words, flag])[1]):
        assert config(recipe).model_type == "own"


def test_weights_are_fetched_again_as_it_is_told(tmp_path):
    model = save_tiny_target(tmp_path / "model")
    shutil.copytree(model, tmp_path / "kept")
    wanted = weights_hash(model)
    path = tmp_path / "model" / "model.safetensors"
    path.write_bytes(b"<html>404</html>")
    torn = read(r"^target\.model: (\S+) is no safetensors file .*; fetch it again$", told(weights_hash, model))
    shutil.copy2(tmp_path / "kept" / Path(torn).name, torn)
    assert weights_hash(model) == wanted


def test_a_number_format_has_the_range_that_it_is_told_to_have(tmp_path):
    model = save_tiny_target(tmp_path / "model")
    lm = tiny_lm()
    lm.model.norm.weight.data.mul_(3e4)
    lm.save_pretrained(model)

    def logprobs(**changes):
        return Run(tiny_recipe(model, "p", **changes), tmp_path / "run", ["test"]).target.identity_logprobs

    line = told(logprobs, **{"target.dtype": "fp16"})
    key = read(r"gives no numbers in fp16; give a (target\.\w+) of a wider range$", line)
    for wider in ("bf16", "fp32"):
        assert all(map(math.isfinite, logprobs(**{"target.dtype": "fp16"} | {key: wider})))
    # where the target wrote completions before, or another server did
    line = told(require_same_logprobs, [-1.0], [math.nan], "target.model: m")
    assert read(r"give a (target\.\w+) of a wider range$", line) == key


def test_a_slow_number_format_is_changed_by_the_flags_that_are_told(recipe_file, monkeypatch, capsys):
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"architecture": "x86_64"}, raising=False)
    tell_slow_products(torch.device("cpu"), "bf16")
    flags = read(r"; give (--.*)$", capsys.readouterr().err.strip())
    recipe = cli.parse(["run", recipe_file, "--target.dtype", "bf16", *flags.split()])[1]
    assert recipe.train.dtype == "fp32"
    tell_slow_products(torch.device("cpu"), recipe.target.dtype)
    assert capsys.readouterr().err == ""


def test_a_licence_is_set_or_left_out_as_it_is_told():
    line = told(licence_of, "owner/unknown")
    key, one, other = read(r"then set (card\.\w+) to what .*, such as (\S+) or (\w+)\)$", line)
    assert key == "card.licence"
    assert licence_of("owner/unknown", one).id == one
    assert licence_of("owner/unknown", other).id == other
    line = told(licence_of, "MiniMaxAI/MiniMax-M2.7", "mit")
    assert read(r"^(card\.\w+): .*; .*: leave it out$", line) == key
    assert licence_of("MiniMaxAI/MiniMax-M2.7").id == "other"


def test_a_limit_to_plan_with_is_given_to_the_source_that_is_named(monkeypatch):
    monkeypatch.setattr("draftsmith.data.sources._streamed", lambda *_: iter([("1", {"prompt": "a b c"})] * 50))
    key, name, limit = read(
        r"^(prompts\.\w+): .* of (\S+) is not .*; give it a (\w+) ", told(source_size, Source(name="a/b"), 1)
    )
    recipe = tiny_recipe("m", "p", **{key: [{"name": name, limit: 9}]})
    assert source_size(recipe.prompts.sources[0], 1)[0] == 9
