"""Where the trainer gets a pack's hidden states: from the target at once (online) or from disk (offline)."""

import contextlib
import itertools
import shutil
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from draftsmith.core.errors import DataError
from draftsmith.core.files import digest, read_json, save_tensors, write_json
from draftsmith.core.progress import Meter, say
from draftsmith.drafts.packing import Pack, filled, to_device
from draftsmith.targets.base import Capture, Target
from draftsmith.training.processes import ProcessGroup

SHARD_TOKENS = 16384


def hidden_state_bytes(tokens: int, taps: int, hidden_size: int, dtype: str) -> int:
    """Bytes of every tap and the last hidden state in the target's format."""
    return tokens * (taps + 1) * hidden_size * (4 if dtype == "fp32" else 2)


CaptureSource = Callable[[Pack], Capture]


class OnlineCapture:
    """By the target itself, without the disk: in this process one pack at a time, on servers as many as are asked."""

    def __init__(self, target: Target, taps: Sequence[int]):
        self.target, self.taps = target, tuple(taps)
        self._turn: Any = contextlib.nullcontext() if target.independent else threading.Lock()

    def __call__(self, pack: Pack) -> Capture:
        with self._turn:
            states = self.target.capture(pack.documents, self.taps)
        # Made under inference mode, and autograd saves only ordinary tensors.
        return Capture(states.taps_TKH.clone(), states.last_TH.clone())


class PrefetchedCapture:
    """Hidden states that are made, read or received while the trainer works.

    Packs are asked for in the order in which they will be trained on, at most `ahead` of them at once: the trainer
    holds the source back, so memory here and files of servers stay bounded. Anything else is asked for on the spot.
    For a GPU all of it happens on a stream of its own, the copies from pinned memory among it, so neither the trainer's
    kernels nor its process wait.
    """

    def __init__(self, source: CaptureSource, packs: Iterator[Pack], ahead: int, device: torch.device):
        self.source, self.packs, self.device = source, packs, device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(device))  # the target's weights may be on their way
        self.fetchers = ThreadPoolExecutor(ahead, thread_name_prefix="capture")
        self.coming: deque[tuple[Pack, Future[tuple[Capture, Any]]]] = deque()
        self._ask_for(ahead)

    def _ask_for(self, more: int) -> None:
        for pack in itertools.islice(self.packs, more):
            self.coming.append((pack, self.fetchers.submit(self._fetch, pack)))

    def _fetch(self, pack: Pack) -> tuple[Capture, Any]:
        """The states, and what has to be over on the GPU before they are there."""
        if self.stream is None:
            return self.source(pack), None
        with torch.cuda.stream(self.stream):
            states = self.source(pack)
            there = (to_device(x, self.device) for x in (states.taps_TKH, states.last_TH))
            return Capture(*there), self.stream.record_event()

    def __call__(self, pack: Pack) -> Capture:
        if not self.coming or self.coming[0][0].names != pack.names:
            states, done = self._fetch(pack)
        else:
            states, done = self.coming.popleft()[1].result()
            self._ask_for(1)
        if done is not None:
            here = torch.cuda.current_stream(self.device)
            here.wait_event(done)
            for x in (states.taps_TKH, states.last_TH):
                x.record_stream(here)  # its memory is not given away before this stream has read it
        return states


class OfflineCapture:
    """Hidden states written once as sharded safetensors and read in every epoch.

    A shard that is there is taken where the same target has read the same texts at the same taps, whoever asked for it.
    """

    def __init__(
        self,
        directory: Path,
        target: Target,
        taps: Sequence[int],
        documents: dict[str, list[int]],
        processes: ProcessGroup,
    ):
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        tokens = sum(map(len, documents.values()))
        size = hidden_state_bytes(tokens, len(taps), target.identity.hidden_size, target.identity.dtype)
        held = sum(path.stat().st_size for path in directory.iterdir())
        free = shutil.disk_usage(directory).free
        say(f"capture: offline, {tokens:,} tokens, {size / 1e9:.2f} GB in {directory} ({free / 1e9:.0f} GB free)")
        if size - held > free:
            raise DataError(
                f"train.capture: offline needs {size / 1e9:.1f} GB, {directory} has {free / 1e9:.1f}; use online"
            )
        self.place: dict[str, tuple[Path, int, int]] = {}
        every, lengths = list(documents), [len(ids) for ids in documents.values()]
        shards = filled(range(len(every)), lengths, SHARD_TOKENS)
        by = [target.identity.model_dump(mode="json"), target.weights_hash, list(taps)]
        for path in directory.iterdir() if processes.main else ():
            if path.stem.isdigit() and int(path.stem) >= len(shards):  # of more texts than these
                path.unlink()
        with Meter("capture", len(shards), "shards") as meter:
            for number, shard in enumerate(shards):
                names = [every[i] for i in shard]
                path = directory / f"{number:05d}.safetensors"
                index = path.with_suffix(".json")
                texts = [documents[name] for name in names]
                key = digest(*by, texts)
                whole = path.exists() and index.exists() and read_json(index) == key
                if number % processes.size == processes.rank and not whole:
                    states = target.capture(texts, tuple(taps))
                    index.unlink(missing_ok=True)
                    save_tensors(path, {"taps": states.taps_TKH.cpu(), "last": states.last_TH.cpu()})
                    write_json(index, key)
                start = 0
                for name in names:
                    self.place[name] = (path, start, len(documents[name]))
                    start += len(documents[name])
                meter.advance(tokens=start)
                if (number + 1) % processes.size == 0:  # nobody is long ahead, whoever finds shards that are there
                    processes.meet()
        processes.meet()

    def __call__(self, pack: Pack) -> Capture:
        taps, last = [], []
        for name in pack.names:
            path, start, length = self.place[name]
            with safe_open(path, "pt") as file:
                taps.append(file.get_slice("taps")[start : start + length])
                last.append(file.get_slice("last")[start : start + length])
        return Capture(torch.cat(taps), torch.cat(last))
