"""Upload a draft and its card to the Hugging Face hub; without --really only say what would go where."""

import os
import re
from pathlib import Path

from draftsmith.core.errors import CheckpointError, DataError, PublishError, RecipeError
from draftsmith.core.files import refusal
from draftsmith.drafts.directories import inspect_draft

WANTED = ("README.md", "config.json", "model.safetensors", "model-*.safetensors", "model.safetensors.index.json")
REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def publish(draft: Path, repo: str, really: bool, public: bool = False) -> str:
    """Check, then upload or tell; returns what to print. The token comes from HF_TOKEN alone.

    A new repository is private unless `public`; one that exists keeps what it is.
    """
    if not REPO.fullmatch(repo):
        raise RecipeError(f"--repo: {repo!r} given; write owner/name")
    if not draft.exists():
        raise DataError(f"publish: no draft in {draft.parent}; run: draftsmith run RECIPE")
    if problems := inspect_draft(draft).blocking():
        raise CheckpointError(f"publish: {draft}: {problems[0]}; see: draftsmith inspect {draft}")
    if not (draft / "README.md").exists():
        raise DataError(f"publish: {draft / 'README.md'} is missing; run: draftsmith card RECIPE")
    chosen = sorted(path for name in WANTED for path in draft.glob(name))
    for path in chosen:
        if why := refusal(path, draft):
            raise CheckpointError(f"publish: {path}: {why}")
    names = [path.name for path in chosen]
    lines = [f"{path.stat().st_size / 1e6:10.1f} MB  {name}" for path, name in zip(chosen, names, strict=True)]
    if not really:
        kind = "public" if public else "private, if it is new"
        return "\n".join([f"would upload to {repo} ({kind}; give --really to do it):", *lines])
    token = os.environ.get("HF_TOKEN")
    if not token:
        raise PublishError("publish: HF_TOKEN is not set; export a token that may write to the repository")
    import httpx2 as httpx
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    hub = HfApi(endpoint=os.environ.get("HF_ENDPOINT"), token=token)
    try:
        hub.create_repo(repo, exist_ok=True, private=not public)
        done = hub.upload_folder(
            repo_id=repo, folder_path=draft, allow_patterns=names, commit_message="Draft made with draftsmith"
        )
    except (HfHubHTTPError, httpx.HTTPError, OSError) as error:
        lines = str(error).strip().splitlines()
        raise PublishError(
            f"publish: {repo} was not uploaded: {lines[-1] if lines else type(error).__name__}"
        ) from None
    return "\n".join([f"uploaded to {done.commit_url}", *lines])
