"""What `plan` says that training holds, against the bytes of a real-size step on the device `meta`."""

import pytest
import torch
from live_bytes import META, LiveBytes, as_on_cuda
from transformers import AutoConfig

from draftsmith.core.recipe import Eagle3Recipe, TrainRecipe
from draftsmith.core.records.data import Completion
from draftsmith.drafts.eagle3.model import Eagle3Draft
from draftsmith.drafts.eagle3.shape import draft_config
from draftsmith.drafts.eagle3.ttt import TTTLoss
from draftsmith.drafts.objectives import pack_inputs
from draftsmith.drafts.packing import make_pack
from draftsmith.targets.configs import target_config

PROMPT = 2  # tokens: nearly every position of a pack starts a chain, as a plan takes for granted
TARGETS = {
    "Qwen3-8B": lambda: target_config("Qwen/Qwen3-8B"),
    "Llama-3.1-8B": lambda: AutoConfig.for_model(
        "llama",
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
    ),
    "gpt-oss-120b": lambda: AutoConfig.for_model("gpt_oss"),
    "MiniMax-M2.7": lambda: target_config("MiniMaxAI/MiniMax-M2.7"),
}


def counted(config, train: TrainRecipe, documents: int) -> int:
    """Peak of a pack's forward and backward, above the weights in the dtype of training."""
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[train.dtype]
    length = train.max_document_tokens
    rows = [Completion(id=str(i), ids=[1] * length, spans=[(PROMPT, length)]) for i in range(documents)]
    pack = make_pack(rows)
    states = dict(dtype=torch.bfloat16, device=META)
    with LiveBytes(META) as bytes_:
        with META:
            loss = TTTLoss(Eagle3Draft(config).to(dtype), train)
        embedding = torch.empty(config.vocab_size, config.hidden_size, **states)
        head = torch.empty(config.draft_vocab_size, config.hidden_size, **states)
        full = torch.empty(config.vocab_size, config.hidden_size, **states) if train.full_teacher else None
        base = bytes_.peak = bytes_.live
        taps = torch.empty(len(pack.ids_T), len(config.taps), config.hidden_size, **states)
        last = torch.empty(len(pack.ids_T), config.hidden_size, **states)
        inputs = pack_inputs(pack, taps, last, embedding, head, full, None, dtype)
        del taps, last
        value, _ = loss(inputs, [1e-4] * train.ttt_steps)
        value.backward()
        return bytes_.peak - base


@pytest.mark.parametrize("name", TARGETS)
def test_activations_are_those_counted(name):
    text = TARGETS[name]().get_text_config()
    config = draft_config(Eagle3Recipe(), text, text.num_hidden_layers, 32000)
    size = config
    for documents, length, objective in ((4, 2048, "soft_ce"), (1, 8192, "soft_ce"), (1, 8192, "lk_lambda")):
        train = TrainRecipe(pack_tokens=documents * length, max_document_tokens=length, objective=objective)
        with as_on_cuda():
            assert size.activation_bytes(train, gpu=True) == pytest.approx(counted(config, train, documents), rel=0.1)


def test_plain_attention_is_counted_where_it_runs():
    """fp32 has no flash kernel: the scores of a chunk of queries are held, too."""
    text = TARGETS["MiniMax-M2.7"]().get_text_config()
    config = draft_config(Eagle3Recipe(), text, text.num_hidden_layers, 32000)
    train = TrainRecipe(pack_tokens=16384, max_document_tokens=16384, ttt_steps=2, dtype="fp32")
    planned = config.activation_bytes(train, gpu=True)
    with as_on_cuda():
        assert planned == pytest.approx(counted(config, train, 1), rel=0.1)
