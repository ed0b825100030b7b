"""`draftsmith init MODEL`."""

from pathlib import Path

from draftsmith.core.recipe_model import Model


class Init(Model):
    """Write a commented recipe for any model, and tell what its files do not say."""

    model: str
    """Directory, hub name, or an embedded target."""
    data: Path | None = None
    """Your own prompts or conversations, a file or folder; left out: 6,000 public prompts that come along."""
    out: Path | None = None
    """Where to write it; left out: NAME-eagle3.yaml here."""
    hardware: str | None = None
    """The machine to choose sizes for, by name (`plan --help` has them); left out: this one."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off unless you trust its author."""

    def __call__(self) -> int:
        from draftsmith.runs.init import init

        path, unknown = init(self.model, self.data, self.out, self.hardware, self.revision, self.trust_remote_code)
        print("\n".join([f"recipe: {path}", *(f"  not known: {what}" for what in unknown)]))
        first = f"draftsmith plan {path}"
        first = f"{first} --hardware {self.hardware}" if self.hardware else f"draftsmith probe {path} && {first}"
        print(f"next:   {first}\n        draftsmith run {path}")
        return 0
