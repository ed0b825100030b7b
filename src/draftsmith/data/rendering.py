"""Chat templates, rendered in a process of their own.

A template is a program that comes with a model. The library's sandbox keeps it from files and the network, but not from
`'x' * 10 ** 10` or a loop without an end, which nothing inside a process can stop. Of another process the kernel takes
time and memory away.
"""

import atexit
import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import threading

from draftsmith.core.errors import DataError
from draftsmith.core.files import JsonObject

MEMORY_BYTES = 512 << 20  # beside what the process has before its first template
SECONDS = 4.0  # of a processor; a template that takes longer is broken or hostile
CHARACTERS = 1_000_000  # of a text, beyond four times what it is made from


class Renderer:
    """The process is started when it is first asked, and again after it has ended."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None

    def render(self, request: JsonObject) -> str:
        """The text of one conversation; `request` are arguments of the library's own `render_jinja_template`.

        Raises `DataError`, in words that go on from the template's name, where it fails or takes more than it may.
        """
        asked = json.dumps(request, default=str)
        with self._lock:
            process, ended = self._running(), None
            assert process.stdin
            assert process.stdout
            try:
                with contextlib.suppress(BrokenPipeError):
                    process.stdin.write(f"{SECONDS} {CHARACTERS + 4 * len(asked)} {asked}\n")
                    process.stdin.flush()
                answer = process.stdout.readline()
            except BaseException:  # nobody may take the answer that is still to come for another one's
                process.kill()
                process.wait()
                raise
            if not answer.endswith("\n"):
                ended = process.wait()
        if ended == -signal.SIGPROF:
            raise DataError(f"did not end within {SECONDS:g} s")
        if ended is not None:
            raise DataError(f"ended the process that rendered it (exit code {ended})")
        told: JsonObject = json.loads(answer)
        if "error" in told:
            raise DataError(told["error"])
        return str(told["text"])

    def _running(self) -> subprocess.Popen[str]:
        if self._process and self._process.poll() is None:
            return self._process
        self.close()
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", __name__],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OPENBLAS_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is for the one who asks
        )
        atexit.register(self.close)
        return self._process

    def close(self) -> None:
        """The process ends when it cannot be asked any more."""
        if self._process:
            with contextlib.suppress(BrokenPipeError):
                self._process.communicate()
            self._process = None


def serve() -> None:
    """Answer each line of stdin (seconds, characters, request) with one of stdout."""
    import psutil
    from transformers.utils.chat_template_utils import render_jinja_template

    most = psutil.Process().memory_info().vms + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # it ends the process, in the middle of a product, too
    for line in sys.stdin:
        seconds, characters, request = line.split(" ", 2)
        signal.setitimer(signal.ITIMER_PROF, float(seconds))  # of its own: a busy machine is not its fault
        try:
            answer = {"text": render_jinja_template(**json.loads(request))[0][0]}
            if len(answer["text"]) > int(characters):
                answer = {"error": f"makes more than {int(characters):,} characters of one prompt"}
        except MemoryError:
            answer = {"error": f"takes more than {MEMORY_BYTES >> 20} MB of memory"}
        except Exception as error:  # a program from outside raises what it likes
            told = " ".join(str(error).split())[:200]
            answer = {"error": f"refuses a conversation: {type(error).__name__}: {told}"}
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve()
