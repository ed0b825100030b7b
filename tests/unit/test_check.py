"""A directory that is not what the checkpoint exports to is caught, and the message names the damage."""

import json
import re
from pathlib import Path

import pytest
import torch
from models import tiny_draft, tiny_target
from safetensors.torch import load_file, save_file

from draftsmith.core.records.training import Belongs, TrainingState
from draftsmith.core.shape import Shape
from draftsmith.data.vocabulary import DraftVocabulary
from draftsmith.decoding.generation import Generation
from draftsmith.evaluation.asking import Question
from draftsmith.runs.check import compare_engines
from draftsmith.training.checkpoints import save_checkpoint
from draftsmith.training.export import damages, export


@pytest.fixture
def exported(tmp_path):
    """(engines' directory, checkpoints, vocabulary)"""
    target = tiny_target()
    draft, ids = tiny_draft(target)
    vocabulary = DraftVocabulary(ids, target.identity.vocab_size)
    belongs = Belongs(
        method="eagle3",
        draft=draft.config.model_dump(mode="json"),
        vocabulary=vocabulary.name,
        target=target.identity,
        train={},
        seed=0,
        data="",
    )
    save_checkpoint(
        tmp_path / "train", draft, [torch.optim.SGD(draft.parameters())], TrainingState(belongs=belongs, step=1), 1
    )
    export(tmp_path / "train", vocabulary, tmp_path / "draft", {"version": "test", "commit": None})
    return tmp_path / "draft", tmp_path / "train", vocabulary


def tensors(change):
    def damage(directory: Path, vocabulary: DraftVocabulary) -> None:
        held = load_file(directory / "model.safetensors")
        change(held, vocabulary)
        save_file({k: v.contiguous() for k, v in held.items()}, directory / "model.safetensors", {"format": "pt"})

    return damage


def config(**changes):
    def damage(directory: Path, vocabulary: DraftVocabulary) -> None:
        path = directory / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


Q = "midlayer.self_attn.q_proj.weight"


def swap(held, one, other):
    held[one], held[other] = held[other].clone(), held[one].clone()


def swapped_norms(held, _):
    held["midlayer.hidden_norm.weight"].fill_(0.5)  # freshly initialised norms are all alike
    swap(held, "midlayer.input_layernorm.weight", "midlayer.hidden_norm.weight")


DAMAGES = {
    "fc.weight is missing": tensors(lambda held, _: held.pop("fc.weight")),
    "eagle_config is {": config(eagle_config={"eagle_aux_hidden_state_layer_ids": [1, 3, 4]}),
    "eagle_aux_hidden_state_layer_ids is [2, 4, 5], trained with [1, 3, 4]": config(
        eagle_aux_hidden_state_layer_ids=[2, 4, 5]
    ),
    "midlayer.input_layernorm.weight is not the trained one": tensors(swapped_norms),
    "d2t holds target ids where engines read offsets": tensors(lambda held, v: held.update(d2t=v.ids_D.clone())),
    "d2t is not the trained one": tensors(lambda held, _: held["d2t"].__setitem__(3, held["d2t"][3] + 1)),
    "lm_head.weight is transposed": tensors(lambda held, _: held.update({"lm_head.weight": held["lm_head.weight"].T})),
    "rope_theta is 500000.0, trained with 10000.0": config(rope_theta=500000.0),
    "midlayer.self_attn.k_proj.weight holds midlayer.self_attn.v_proj.weight: swapped": tensors(
        lambda held, _: swap(held, "midlayer.self_attn.k_proj.weight", "midlayer.self_attn.v_proj.weight")
    ),
    "midlayer.self_attn.q_proj.weight has shape [32, 32], not [32, 64]": tensors(
        lambda held, _: held.update(
            {"midlayer.self_attn.q_proj.weight": held["midlayer.self_attn.q_proj.weight"][:, :32]}
        )
    ),
    "norm.weight has shape [1, 32], not [32]": tensors(
        lambda held, _: held.update({"norm.weight": held["norm.weight"][None]})
    ),
    "norm.weight is torch.float32, not torch.bfloat16": tensors(
        lambda held, _: held.update({"norm.weight": held["norm.weight"].float()})
    ),
    "lm_head.bias is not of this draft": tensors(lambda held, _: held.update({"lm_head.bias": torch.zeros(40)})),
    "num_attention_heads is 8, trained with 4": config(num_attention_heads=8),
}


@pytest.mark.parametrize("wanted", DAMAGES)
def test_a_damage_is_named(exported, wanted):
    directory, checkpoints, vocabulary = exported
    assert damages(directory, checkpoints, vocabulary) == []
    DAMAGES[wanted](directory, vocabulary)
    found = damages(directory, checkpoints, vocabulary)
    assert any(wanted in problem for problem in found), found


def decoded(accepted, size=40):
    return Generation(list(range(size)), "length", tuple(accepted))


def test_engines_that_differ_beyond_noise_are_told_apart():
    questions = [Question(str(i), "chat", [1]) for i in range(6)]
    accepted = [[i % 4, 2, 1, 3, 0, 2, 1, 2, 3, 1] for i in range(6)]
    shape = Shape(3, 1, 4)
    ours = [decoded(a) for a in accepted]
    told, problems = compare_engines("vllm", shape, questions, ours, [decoded(a) for a in accepted])
    taus = re.findall(r"(?:T=0: tau|embedded) (\S+ \(.*?\))", told)
    assert (problems, taus[0], "identical on 6 of 6" in told) == ([], taus[1], True)
    _, worse = compare_engines("vllm", shape, questions, ours, [decoded([0, 1] * 10) for _ in accepted])
    assert "vllm accepts tau 1.5" in worse[0]
    _, other = compare_engines("vllm", shape, questions, ours, [decoded(a, 39) for a in accepted])
    assert "agree on only 0 of 6 prompts" in other[0]


def test_sampled_drafts_are_held_to_their_acceptance_alone():
    """Texts that are drawn differ; a draft that is taken greedily where it should be drawn is found out."""
    questions = [Question(str(i), "chat", [1]) for i in range(6)]
    shape, ours = Shape(3, 1, 4), [decoded([2, 1, 3, 1, 2] * 8) for _ in range(6)]
    told, problems = compare_engines("vllm", shape, questions, ours, [decoded([1, 2, 1, 3, 2] * 8, 39)] * 6, 1.0)
    assert (problems, "identical" in told) == ([], False)
    assert told.startswith("vllm 3/1/4, T=1, sampled drafts: tau 2.79 (1.00 0.57 0.38), embedded 2.85 (")
    _, problems = compare_engines("vllm", shape, questions, ours, [decoded([1, 0, 2, 1, 0] * 8, 39)] * 6, 1.0)
    assert re.match(r"vllm accepts tau 1\.8\d where the trained draft has 2\.85", problems[0])
    assert re.match(r"at depth 1 vllm accepts 6\d% where the trained draft has 100%", problems[1])
