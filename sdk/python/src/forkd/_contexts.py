"""What ``with`` and ``async with`` do of all that ends by one call."""

from __future__ import annotations

from types import TracebackType
from typing import Optional, Type, TypeVar

C = TypeVar("C", bound="Context")
A = TypeVar("A", bound="AsyncContext")


class Context:
    """Is itself inside a ``with``, and ends by :meth:`_leave` with it."""

    def _leave(self) -> None:
        raise NotImplementedError

    def __enter__(self: C) -> C:
        return self

    def __exit__(
        self,
        kind: Optional[Type[BaseException]],
        error: Optional[BaseException],
        traceback: Optional[TracebackType],
    ) -> None:
        self._leave()


class AsyncContext:
    """Is itself inside an ``async with``, and ends by :meth:`_leave` with it."""

    async def _leave(self) -> None:
        raise NotImplementedError

    async def __aenter__(self: A) -> A:
        return self

    async def __aexit__(
        self,
        kind: Optional[Type[BaseException]],
        error: Optional[BaseException],
        traceback: Optional[TracebackType],
    ) -> None:
        await self._leave()
