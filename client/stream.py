"""Many questions at once, their answers in order."""

from __future__ import annotations

import asyncio
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Awaitable,
    Callable,
    Iterable,
)
from typing import TypeVar

from .errors import InvalidRequestError

ItemT = TypeVar("ItemT")
AnswerT = TypeVar("AnswerT")

# A slow answer holds up the quick ones behind it; so far may those run ahead of it.
WINDOW = 2


async def in_order(
    items: Iterable[ItemT] | AsyncIterable[ItemT],
    ask: Callable[[ItemT], Awaitable[AnswerT]],
    concurrency: int,
) -> AsyncGenerator[AnswerT, None]:
    """Ask about every item with a bounded number of questions in flight.

    Args:
        items: read as answers are taken: never more than `WINDOW * concurrency` items ahead.
        ask: one question. What it raises ends the stream.
        concurrency: questions in flight, at least 1.

    Yields:
        Answers in the order of the items, each as soon as it and all before it are there.

    Raises:
        InvalidRequestError: `concurrency` is less than 1.
    """
    if concurrency < 1:
        raise InvalidRequestError(f"concurrency must be at least 1; got {concurrency}")
    asked: asyncio.Queue[asyncio.Task[AnswerT] | None] = asyncio.Queue()
    unfinished: set[asyncio.Task[AnswerT]] = set()
    window = asyncio.Semaphore(WINDOW * concurrency)
    slots = asyncio.Semaphore(concurrency)

    async def ask_in_turn(item: ItemT) -> AnswerT:
        async with slots:
            return await ask(item)

    async def read() -> None:
        try:
            await window.acquire()
            async for item in _each(items):
                task = asyncio.create_task(ask_in_turn(item))
                unfinished.add(task)
                asked.put_nowait(task)
                await window.acquire()
        finally:
            asked.put_nowait(None)

    reader = asyncio.create_task(read())
    try:
        while (task := await asked.get()) is not None:
            # Shielded, or cancelling this would free a slot for one more question first.
            answer = await asyncio.shield(task)
            unfinished.discard(task)
            yield answer
            window.release()
        await reader  # raises what reading the items raised
    finally:
        reader.cancel()
        for task in unfinished:
            task.cancel()
        await asyncio.gather(reader, *unfinished, return_exceptions=True)


async def _each(items: Iterable[ItemT] | AsyncIterable[ItemT]) -> AsyncIterator[ItemT]:
    if isinstance(items, AsyncIterable):
        async for item in items:
            yield item
    else:
        for item in items:
            yield item
