"""The engines that decode for draftsmith; another one is a file and a line here."""

from draftsmith.core.recipe import EngineName
from draftsmith.core.records.base import Decodes
from draftsmith.engines.base import Engine
from draftsmith.engines.embedded import Embedded
from draftsmith.engines.server import ServerEngine
from draftsmith.engines.sglang import SGLang
from draftsmith.engines.vllm import VLLM

SERVERS: dict[EngineName, ServerEngine] = {engine.name: engine for engine in (VLLM(), SGLang())}
ENGINES: dict[Decodes, Engine] = {engine.name: engine for engine in (Embedded(), *SERVERS.values())}
