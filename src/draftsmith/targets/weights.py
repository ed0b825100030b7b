"""A target's embedding, final norm and head alone: all that a trainer needs beside hidden states."""

import contextlib
import json
import re
from pathlib import Path

import torch
from torch import Tensor, nn

from draftsmith.core.errors import TargetError
from draftsmith.core.recipe import TargetRecipe
from draftsmith.targets.base import Target
from draftsmith.targets.configs import read_config
from draftsmith.targets.parts import empty_model, first_line, load_tokenizer, on_guard, resolve_device, resolve_model


class WeightsOnlyTarget(Target):
    """A model whose layers are never loaded: 230 B parameters cost three tensors here."""

    def __init__(self, settings: TargetRecipe, device: str):
        from transformers import GenerationConfig

        model, revision, trusted = settings.model, settings.revision, settings.trust_remote_code
        self.device = resolve_device(device)
        self.tokenizer = load_tokenizer(model, revision, trusted)
        path = resolve_model(model)
        with on_guard(f"cannot read {model!r}"):
            lm = empty_model(read_config(path, revision, trusted), settings.dtype, trusted)
            with contextlib.suppress(OSError):  # a model without one ends by its config
                lm.generation_config = GenerationConfig.from_pretrained(path, revision=revision or "main")
            self._adopt(lm, model, revision, settings.dtype, settings.template_options)
        self._source = path, revision

    @torch.inference_mode(False)  # whoever asks first, a trainer computes gradients through them
    def _load(self) -> None:
        """Read the three tensors on first use; regeneration needs none of them."""
        if not self.head.weight.is_meta:
            return
        dtype = self.head.weight.dtype
        names = {id(module): name.split(".")[-1] for name, module in self.lm.named_modules()}
        modules = (self.embedding, self.norm, self.head)
        found = _read_tensors(
            *self._source,
            tied=any(bool(getattr(config, "tie_word_embeddings", False)) for config in (self.lm.config, self.config)),
            leaves=tuple(names[id(module)] for module in modules),
            strays=tuple(getattr(type(self.lm), "_keys_to_ignore_on_load_unexpected", None) or ()),
        )
        for module, weight in zip(modules, found, strict=True):
            if weight.shape != module.weight.shape:
                raise TargetError(
                    f"target.model: {self.identity.model} stores {list(weight.shape)} where its config says "
                    f"{list(module.weight.shape)}; its config belongs to another model"
                )
            module.weight = nn.Parameter(weight.to(self.device, dtype), requires_grad=False)


# Modules beside the decoder that hold embeddings and norms of their own: multi-token prediction, towers, projectors.
BESIDE = re.compile(r"(^|\.)(layers|blocks|mtp\w*|vis\w+|audio\w*|\w*tower|\w*projector|merger|\w*encoder|talker)\.")


def _read_tensors(
    path: str, revision: str | None, tied: bool, leaves: tuple[str, ...], strays: tuple[str, ...]
) -> list[Tensor]:
    """Embedding, final norm and head, from the few files that hold them.

    `leaves`: what the model's class calls the three, under whatever prefix; `strays`: patterns of tensors that the
    class itself ignores. A checkpoint without a head has its embedding for it where `tied` allows that.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    from safetensors import SafetensorError, safe_open

    def local(name: str) -> Path:
        if Path(path).is_dir():
            return Path(path, name)
        return Path(hf_hub_download(path, name, revision=revision))

    try:
        try:
            index = json.loads(local("model.safetensors.index.json").read_text())["weight_map"]
        except (FileNotFoundError, HfHubHTTPError, LocalEntryNotFoundError):
            with safe_open(local("model.safetensors"), "pt") as file:
                index = dict.fromkeys(file.keys(), "model.safetensors")
        own = [n for n in index if not BESIDE.search(n) and not any(re.search(s, n) for s in strays)]
        tensors: list[Tensor] = []
        for leaf in leaves:
            names = [name for name in own if re.fullmatch(rf"(.+\.)?{leaf}\.weight", name)]
            if not names and tied and len(tensors) == 2:
                return [*tensors, tensors[0]]
            if len(names) != 1:
                what = f"{len(names)} tensors ({', '.join(names)})" if names else "no tensor"
                raise TargetError(f"target.model: {path} has {what} named {leaf}.weight")
            with safe_open(local(index[names[0]]), "pt") as file:
                tensors.append(file.get_tensor(names[0]))
    except (OSError, SafetensorError) as error:
        raise TargetError(f"target.model: cannot read the weights of {path}: {first_line(error)}") from None
    return tensors
