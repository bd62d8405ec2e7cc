"""When a request is sent again.

Only one that does no more when it is sent twice, and only when the connection broke or the daemon said when to come
again. A daemon that is not there at the first attempt is no reason to wait; one that went away afterwards may come
back.
"""

from __future__ import annotations

import http.client
import random
import urllib.error
from typing import Any, Optional

from ._calls import Call
from .errors import ControllerError, DaemonUnreachable

FIRST_PAUSE = 0.2
"""How long to wait before the second attempt, in seconds; each further pause is twice as long."""

LONGEST_PAUSE = 30.0
"""A daemon that wants to be left alone for longer is not asked again."""


def pause(call: Call[Any], error: Exception, attempt: int, retries: int) -> Optional[float]:
    """How long to wait before ``call`` is sent again, after attempt number ``attempt`` ended in ``error``; ``None``
    when it is not. Attempts are counted from 0."""
    if attempt >= retries or not call.repeatable:
        return None
    # Clients that one daemon has cut off do not come back at the same instant.
    usual: float = FIRST_PAUSE * 2**attempt * random.uniform(0.75, 1.25)
    if isinstance(error, ControllerError):
        if error.retry_after is None or error.retry_after > LONGEST_PAUSE:
            return None
        return max(usual, error.retry_after)
    if isinstance(error, DaemonUnreachable):
        return usual if attempt > 0 else None
    return usual if broke(error) else None


def broke(error: Exception) -> bool:
    """Whether the connection ended before the answer did."""
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    return isinstance(reason, (ConnectionError, http.client.HTTPException))
