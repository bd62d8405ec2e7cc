"""The daemon's API as coroutines. Needs the extra ``forkd[async]``."""

from __future__ import annotations

from ._aio_controller import AsyncController
from ._aio_events import AsyncEventStream
from ._aio_files import AsyncFiles
from ._aio_process import AsyncProcess
from ._aio_sandbox import AsyncCommands, AsyncSandbox

__all__ = ["AsyncCommands", "AsyncController", "AsyncEventStream", "AsyncFiles", "AsyncProcess", "AsyncSandbox"]
