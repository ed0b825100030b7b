"""Export, strict reading, and the damages that engines would serve in silence."""

import json

import pytest
import torch
from models import tiny_draft, tiny_target
from safetensors.torch import load_file, save_file

from draftsmith.commands.inspect import page as describe
from draftsmith.core.errors import CheckpointError
from draftsmith.data.vocabulary import DraftVocabulary
from draftsmith.drafts.directories import inspect_draft, load_draft, write_draft
from draftsmith.drafts.eagle3.config_file import IDS
from draftsmith.drafts.eagle3.files import engine_config
from draftsmith.targets.parts import UNBOUNDED


@pytest.fixture
def exported(tmp_path):
    draft, ids = tiny_draft(tiny_target(), fc_norm=True)
    target = {"model": "tiny", "dtype": "fp32", "num_layers": 6}
    write_draft(tmp_path / "d", draft, ids, 6, {"version": "0", "commit": None, "target": target})
    return tmp_path / "d", draft, ids


def problems(directory):
    return [p for p in inspect_draft(directory).problems if not p.startswith("note:")]


def test_what_is_written_is_read_back(exported):
    directory, draft, ids = exported
    again, ids_again = load_draft(directory, torch.float32)
    assert torch.equal(ids, ids_again)
    assert again.config == draft.config
    for (name, a), b in zip(draft.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a.to(torch.bfloat16).float(), b), name
    text = describe(inspect_draft(directory))
    assert "no problems found" in text
    assert "EAGLE-3" in text
    assert "[1, 3, 4]" in text


def test_the_files_are_as_the_engines_read_them(exported):
    directory, draft, ids = exported
    tensors, config = load_file(directory / "model.safetensors"), json.loads((directory / "config.json").read_text())
    assert torch.equal(torch.arange(len(ids)) + tensors["d2t"], ids)
    assert tensors["d2t"].dtype == torch.int64
    assert tensors["t2d"].dtype == torch.bool
    assert tensors["t2d"].nonzero().flatten().tolist() == ids.tolist()
    assert tensors["midlayer.self_attn.q_proj.weight"].shape == (32, 64)
    assert "embed_tokens.weight" not in tensors
    assert config["architectures"] == ["LlamaForCausalLMEagle3"]
    assert config["draft_vocab_size"] == len(ids)
    assert config["eagle_aux_hidden_state_layer_ids"] == [1, 3, 4]  # vLLM: layer inputs
    assert config["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [0, 2, 3]  # SGLang: layer outputs
    assert config["num_aux_hidden_states"] == 3
    assert config["rope_parameters"]["rope_theta"] == config["rope_theta"] == draft.config.rope_theta
    assert config["tie_word_embeddings"] is False


@pytest.mark.parametrize(
    ("taps", "layers", "named"),
    [
        ((2, 31, 59), 62, None),
        ((2, 9, 15), 18, None),
        ((2, 9, 16), 18, [2, 9, 16]),
        ((0, 9, 15), 18, [0, 9, 15]),
        ((2, 9), 18, [2, 9]),
    ],
)
def test_taps_that_no_engine_takes_by_itself_are_named(taps, layers, named):
    draft, _ = tiny_draft(tiny_target())
    assert engine_config(draft.config.model_copy(update={"taps": taps}), layers, {}).get(IDS) == named


@pytest.mark.parametrize(
    ("taps", "ids"),
    [
        ((2, 3, 4), {}),  # of 7 layers: the default
        ((1, 3, 5), {"top": [1, 3, 5], "nested": [0, 2, 4]}),
        ((0, 3, 5), {"top": [0, 3, 5]}),  # which SGLang's ids cannot say
    ],
)
def test_a_directory_names_its_taps_to_each_engine(tmp_path, taps, ids):
    draft, rows = tiny_draft(tiny_target())
    draft.config = draft.config.model_copy(update={"taps": taps})
    target = {"model": "tiny", "dtype": "fp32", "num_layers": 7}
    write_draft(tmp_path, draft, rows, 7, {"target": target})
    config = json.loads((tmp_path / "config.json").read_text())
    assert config.get(IDS) == ids.get("top")
    assert config["eagle_config"].get(IDS) == ids.get("nested")
    assert load_draft(tmp_path)[0].config.taps == taps
    for reading in ("auto", "outputs", "inputs"):
        assert load_draft(tmp_path, layers=7, reading=reading)[0].config.taps == taps


@pytest.mark.parametrize(
    ("top", "nested", "message"),
    [
        ([2, 4, 5], [0, 2, 3], "vLLM would capture taps [2, 4, 5] (eagle_aux_hidden_state_layer_ids"),
        ([1, 3, 4], [1, 3, 4], "SGLang would capture taps [2, 4, 5] (eagle_config.eagle_aux_hidden"),
        ([4, 3, 1], [0, 2, 3], "vLLM would capture taps [4, 3, 1]"),
        (None, [0, 2, 3], "vLLM would capture taps its default [2, 3, 3]"),
        ([1, 3, 4], None, "SGLang would capture taps its default [2, 3, 3]"),
        (None, None, "vLLM would capture taps its default [2, 3, 3]"),
    ],
)
def test_ids_that_an_engine_would_read_otherwise_are_named(exported, top, nested, message):
    directory, _, _ = exported
    config = json.loads((directory / "config.json").read_text())
    config[IDS], config["eagle_config"][IDS] = top, nested
    (directory / "config.json").write_text(json.dumps(config))
    (problem, *others) = problems(directory)
    assert problem.startswith(message)
    assert problem.endswith("trained with [1, 3, 4]")
    assert len(others) == (top is None and nested is None)  # then of both engines


def damage_tensors(**changes):
    def apply(tensors, config):
        for name, change in changes.items():
            key = name.replace("__", ".")
            if change is None:
                del tensors[key]
            else:
                tensors[key] = change(tensors[key])

    return apply


def damage_config(**changes):
    def apply(tensors, config):
        for key, value in changes.items():
            if value is None:
                del config[key]
            else:
                config[key] = value

    return apply


def rename_fc(tensors, config):
    tensors["fuse.weight"] = tensors.pop("fc.weight")


def absolute_d2t(tensors, config):
    tensors["d2t"] = torch.arange(len(tensors["d2t"])) + tensors["d2t"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_tensors(fc__weight=None), "fc.weight is missing"),
        (rename_fc, "fuse.weight [32, 96] is unknown"),
        (
            damage_tensors(lm_head__weight=lambda t: t.T.contiguous()),
            "lm_head.weight has shape [32, 40], wanted [40, 32]",
        ),
        (damage_tensors(norm__weight=None), "norm.weight is missing"),
        (damage_tensors(norm__weight=lambda t: t * float("nan")), "norm.weight holds NaN"),
        (damage_tensors(midlayer__mlp__up_proj__weight=lambda t: t * 0), "is all zeros"),
        (damage_tensors(fc__weight=lambda t: t.long()), "wanted a floating-point one"),
        (absolute_d2t, "target ids where engines read offsets"),
        (damage_tensors(d2t=lambda t: t.flip(0)), "d2t"),
        (damage_tensors(d2t=lambda t: t[:-1]), "d2t has shape (39,)"),
        (damage_tensors(t2d=lambda t: t.roll(1)), "t2d does not name the tokens"),
        (damage_tensors(d2t=None), "d2t is missing"),
        (damage_config(draft_vocab_size=None), "draft_vocab_size is missing"),
        (damage_config(rope_theta=5e6), "rope_theta is 5000000.0 at the top level but 10000.0"),
        (damage_config(num_aux_hidden_states=2), "fc.weight fuses 3 taps, config.json says 2"),
        (damage_config(max_position_embeddings=2048), "max_position_embeddings 2048 is short"),
        (damage_config(tie_word_embeddings=True), "tie_word_embeddings is true"),
        (damage_config(norm_before_residual=True), "norm_before_residual is not supported"),
        (damage_config(eagle_aux_hidden_state_layer_ids=[1, 2, 3]), "vLLM would capture taps [1, 2, 3]"),
        (damage_config(fc_norm=False), "fc_norm.0.weight [32] is unknown"),
        (damage_config(hidden_size=None), "hidden_size is missing"),
    ],
)
def test_each_damage_is_named(exported, damage, message):
    directory, _, _ = exported
    tensors, config = load_file(directory / "model.safetensors"), json.loads((directory / "config.json").read_text())
    damage(tensors, config)
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config))
    assert any(message in problem for problem in problems(directory)), problems(directory)
    with pytest.raises(CheckpointError):
        load_draft(directory)


@pytest.mark.parametrize(("length", "short"), [(32768, False), (2048, True)])
def test_a_target_that_counts_no_positions_wants_what_its_draft_is_given(exported, length, short):
    directory, _, _ = exported
    config = json.loads((directory / "config.json").read_text()) | {"max_position_embeddings": length}
    config["draftsmith"]["target"] = {"max_position_embeddings": UNBOUNDED, "num_layers": 6}
    (directory / "config.json").write_text(json.dumps(config))
    assert any("is short" in problem for problem in problems(directory)) == short


def test_other_spellings_are_read(exported):
    """`layers.0.` and `model.` prefixes, stored embeddings, no t2d: other people's drafts."""
    directory, draft, _ids = exported
    tensors = load_file(directory / "model.safetensors")
    renamed = {"model." + n.replace("midlayer.", "layers.0."): t for n, t in tensors.items() if n not in ("d2t", "t2d")}
    embeddings = {"model.embed_tokens.weight": torch.zeros(64, 32)}
    save_file({**renamed, "d2t": tensors["d2t"], **embeddings}, directory / "model.safetensors")
    report = inspect_draft(directory)
    assert problems(directory) == []
    assert any("embed_tokens is stored" in p for p in report.problems)
    again, _ = load_draft(directory, torch.float32)
    assert torch.equal(again.fc.weight, draft.fc.weight.to(torch.bfloat16).float())


@pytest.mark.parametrize(
    ("ids", "reading", "taps"),
    [
        ({}, "auto", (2, 8, 13)),  # the engines' default for 16 layers
        ({"eagle_config": {IDS: [1, 7, 12]}}, "auto", (2, 8, 13)),
        ({"eagle_config": {IDS: [1, 7, 12]}}, "inputs", (1, 7, 12)),
        ({IDS: [2, 8, 13]}, "auto", (2, 8, 13)),
        ({IDS: [2, 8, 13]}, "outputs", (3, 9, 14)),
        ({IDS: [2, 8, 13], "eagle_config": {IDS: [1, 7, 12]}}, "auto", (2, 8, 13)),  # both say the same
        ({IDS: [2, 8, 13], "eagle_config": {IDS: [2, 8, 13]}}, "inputs", (2, 8, 13)),
        ({IDS: [2, 8, 13], "eagle_config": {IDS: [2, 8, 13]}}, "outputs", (3, 9, 14)),
    ],
)
def test_drafts_of_others_are_read_by_their_own_convention(exported, ids, reading, taps):
    directory, _, _ = exported
    config = json.loads((directory / "config.json").read_text())
    for key in ("draftsmith", "eagle_config", "eagle_aux_hidden_state_layer_ids"):
        config.pop(key, None)
    config |= ids | {"max_position_embeddings": 2048}  # which spoils serving, not the draft
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError):
        load_draft(directory, torch.float32)
    draft, _ = load_draft(directory, torch.float32, 16, reading)
    assert draft.config.taps == taps


def test_two_keys_that_differ_have_to_be_chosen_from(exported):
    directory, _, _ = exported
    config = json.loads((directory / "config.json").read_text())
    del config["draftsmith"]
    config["eagle_config"][IDS] = config[IDS]
    (directory / "config.json").write_text(json.dumps(config))
    assert problems(directory) == ["vLLM would capture taps [1, 3, 4], SGLang [2, 4, 5]"]
    with pytest.raises(CheckpointError, match=r"delete the wrong ones \(compare: --taps inputs or --taps outputs\)"):
        load_draft(directory, layers=6, reading="auto")


def test_pickled_weights_are_not_loaded(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"no \.safetensors file \(pytorch_model\.bin is pickled"):
        inspect_draft(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        inspect_draft(tmp_path)


def test_a_vocabulary_is_named_by_its_content():
    one = DraftVocabulary(torch.tensor([0, 3, 5]), 10)
    assert one.name == DraftVocabulary(torch.tensor([0, 3, 5]), 10).name
    assert one.name != DraftVocabulary(torch.tensor([0, 3, 6]), 10).name
    assert one.name != DraftVocabulary(torch.tensor([0, 3, 5]), 11).name
