"""EAGLE-3 (arXiv 2503.01840) as a drafting method."""

from draftsmith.drafts.eagle3.config import Eagle3Config
from draftsmith.drafts.eagle3.drafter import Eagle3Drafter
from draftsmith.drafts.eagle3.files import ARCHITECTURE, check_directory, draft_files, facts, named_taps
from draftsmith.drafts.eagle3.model import Eagle3Draft
from draftsmith.drafts.eagle3.shape import draft_config, shape_note
from draftsmith.drafts.eagle3.ttt import TTTLoss, ttt_outputs
from draftsmith.drafts.method import Method
from draftsmith.drafts.recognise import EAGLE3

METHOD = Method(
    name=Eagle3Draft.method,
    title=EAGLE3,
    architecture=ARCHITECTURE,
    config=draft_config,
    config_note=shape_note,
    read_config=Eagle3Config.model_validate,
    build=Eagle3Draft,
    loss=TTTLoss,
    guesses=ttt_outputs,
    drafter=Eagle3Drafter,
    files=draft_files,
    inspect=check_directory,
    taps=named_taps,
    facts=facts,
)
