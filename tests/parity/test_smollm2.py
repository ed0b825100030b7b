"""The embedded target itself: its chat template, its end token and its words are those of transformers."""

import torch
from models import local_target
from transformers import AutoModelForCausalLM

from draftsmith.core.recipe_file import parse_recipe
from draftsmith.data.templates import ChatFormat
from draftsmith.decoding.sampling import Sampling
from draftsmith.targets.embedded import materialise

NAME = "smollm2-135m-instruct"


def test_the_embedded_target_answers_as_transformers_does():
    recipe = parse_recipe({"name": "x", "target": {"model": NAME, "dtype": "fp32"}}, "test")
    target = local_target(NAME)
    prompt = ChatFormat.of(recipe, target).first_turn("What is the capital of France?", None, None)
    assert target.tokenizer.decode(prompt).endswith("<|im_start|>assistant\n")
    assert target.library is None
    made = dict(target.generate([list(prompt)], Sampling(), 12))[0]
    own = AutoModelForCausalLM.from_pretrained(materialise(NAME), dtype=torch.float32)
    wanted = own.generate(torch.tensor([list(prompt)]), max_new_tokens=12, do_sample=False)[0, len(prompt) :].tolist()
    assert made.ids == wanted
    assert "Paris" in target.tokenizer.decode(made.ids)
    assert made.finish_reason == "eos"
