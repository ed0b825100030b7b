"""A target whose layers were never loaded lends the same rows as the whole one."""

import pytest
import torch
from models import BUILDERS, save_tiny_target, tiny_tokenizer

from draftsmith.errors import TargetError
from draftsmith.targets.ends import LooseEnds
from draftsmith.targets.local import LocalTarget


@pytest.mark.parametrize("architecture", BUILDERS)
def test_loose_ends_equal_the_whole_model(architecture, tmp_path):
    model = save_tiny_target(tmp_path, architecture)
    whole, ends = LocalTarget(model, dtype="fp32", device="cpu"), LooseEnds(model, dtype="fp32", device="cpu")
    assert ends.identity == whole.identity
    assert (ends.eos_ids, ends.logit_softcap) == (whole.eos_ids, whole.logit_softcap)
    ids = torch.tensor([3, 0, 63])
    hidden = torch.randn(5, whole.identity.hidden_size, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ends.head_rows(ids), whole.head_rows(ids))
    assert torch.equal(ends.embedding_rows(), whole.embedding_rows())
    assert torch.equal(ends.norm_gain(), whole.norm_gain())
    assert torch.equal(ends.final_norm(hidden), whole.final_norm(hidden))


def test_tied_and_sharded_weights_are_found(tmp_path):
    lm = BUILDERS["qwen3"]()
    lm.config.tie_word_embeddings = True
    lm.tie_weights()
    lm.save_pretrained(tmp_path, max_shard_size="20KB")
    tiny_tokenizer().save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors.index.json").exists()
    ends = LooseEnds(str(tmp_path), dtype="fp32", device="cpu")
    everything = torch.arange(64)
    assert torch.equal(ends.head_rows(everything), ends.embedding_rows())
    assert torch.equal(ends.embedding_rows(), lm.get_input_embeddings().weight)


def test_a_config_of_another_model_is_refused(tmp_path):
    model = save_tiny_target(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"hidden_size": 32', '"hidden_size": 64'))
    with pytest.raises(TargetError, match="its config belongs to another model"):
        LooseEnds(model, dtype="fp32", device="cpu").embedding_rows()
