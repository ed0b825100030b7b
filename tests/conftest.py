import json
import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
# threads of two processes at once fight, and slow both tenfold: give OMP_NUM_THREADS=1 beside other work
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Directory of a tiny target."""
    from models import save_tiny_target

    return save_tiny_target(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def target(model):
    """It in this process."""
    from models import local_target

    return local_target(model)


@pytest.fixture
def prompts(tmp_path):
    """File of prompts as the stage writes them."""
    from models import write_prompts

    from draftsmith.core.records.base import write_rows
    from draftsmith.core.records.data import Prompt

    path = tmp_path / "prompts.jsonl"
    rows = [json.loads(line) for line in Path(write_prompts(tmp_path / "raw.jsonl")).read_text().splitlines()]
    write_rows(path, [Prompt(source="t", messages=[{"role": "user", "content": r.pop("prompt")}], **r) for r in rows])
    return path
