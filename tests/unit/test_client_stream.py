"""Streams: order, bounded concurrency, back-pressure, one image's error, leaving early."""

import asyncio
import os
import threading
import time
from contextlib import aclosing

import grpc
import pytest

from client import AsyncGrpcClient, GrpcClient, InvalidRequestError, Prediction, UnavailableError
from client.stream import WINDOW, in_order
from tests.unit.client_servers import grpc_server, image


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 60))


class Questions:
    """An `ask` that answers when told, and counts."""

    def __init__(self):
        self.asked = self.running = self.most = self.cancelled = 0
        self.gates = {}

    async def __call__(self, item):
        self.asked += 1
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await self.gates.setdefault(item, asyncio.Event()).wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1
        return item * 10

    def open(self, *items):
        for item in items:
            self.gates.setdefault(item, asyncio.Event()).set()


async def settle():
    """Let every task get as far as it can."""
    for _ in range(50):
        await asyncio.sleep(0)


class Counted:
    """Items 0, 1, 2, ..., and how many were read."""

    def __init__(self, count):
        self.count, self.read = count, 0

    def __iter__(self):
        while self.read < self.count:
            self.read += 1
            yield self.read - 1

    async def later(self):
        for item in self:
            await asyncio.sleep(0)
            yield item


@pytest.mark.parametrize("as_async", [False, True])
@pytest.mark.parametrize("concurrency", [1, 3, 100])
@pytest.mark.parametrize("count", [0, 20])
def test_answers_come_in_the_order_of_the_items(as_async, concurrency, count):
    async def ask(item):
        await asyncio.sleep(0.002 * (item % 5))
        return item

    async def main():
        items = Counted(count).later() if as_async else range(count)
        return [answer async for answer in in_order(items, ask, concurrency)]

    assert run(main()) == list(range(count))


def test_no_more_questions_are_in_flight_than_allowed():
    async def main():
        questions = Questions()
        answers = in_order(range(30), questions, 3)
        first = asyncio.create_task(anext(answers))
        await settle()
        assert questions.running == 3
        questions.open(*range(1, 30))  # the first holds up the answers, not the questions
        await settle()
        assert not first.done() and questions.running == 1
        assert questions.asked == 3 * WINDOW
        questions.open(0)
        rest = [await first] + [answer async for answer in answers]
        assert rest == [10 * i for i in range(30)] and questions.most == 3

    run(main())


def test_items_are_read_only_as_answers_are_taken():
    async def main():
        items, questions = Counted(100), Questions()
        questions.open(*range(100))
        answers = in_order(items, questions, 2)
        for taken in range(1, 11):
            await anext(answers)
            await settle()
            assert taken < items.read <= taken + 2 * WINDOW
        await answers.aclose()

    run(main())


def test_an_answer_is_given_before_the_next_item_is_there():
    async def main():
        never = asyncio.Event()

        async def items():
            yield 1
            await never.wait()

        questions = Questions()
        questions.open(1)
        async with aclosing(in_order(items(), questions, 8)) as answers:
            assert await asyncio.wait_for(anext(answers), 10) == 10

    run(main())


@pytest.mark.parametrize("how", ["break", "cancel"])
def test_leaving_early_cancels_what_is_in_flight(how):
    async def main():
        questions = Questions()
        questions.open(0)

        async def take():
            async with aclosing(in_order(range(100), questions, 4)) as answers:
                async for _ in answers:
                    if how == "break":
                        await settle()
                        break

        before = asyncio.all_tasks()
        task = asyncio.create_task(take())
        await settle()
        if how == "cancel":
            assert questions.running == 4
            task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert (questions.running, questions.cancelled) == (0, 4)
        assert asyncio.all_tasks() == before

    run(main())


def test_what_reading_raises_comes_after_the_answers_to_what_was_read():
    def items():
        yield 1
        yield 2
        raise OSError("the disk is gone")

    async def main():
        questions = Questions()
        questions.open(1, 2)
        answers = in_order(items(), questions, 4)
        found = [await anext(answers), await anext(answers)]
        with pytest.raises(OSError, match="the disk is gone"):
            await anext(answers)
        return found

    assert run(main()) == [10, 20]


def test_no_concurrency_is_refused():
    async def main():
        await anext(in_order([1], Questions(), 0))

    with pytest.raises(InvalidRequestError, match="concurrency must be at least 1; got 0"):
        run(main())


# --- over gRPC ---------------------------------------------------------------------------------


def test_a_stream_gives_predictions_and_the_error_of_one_image_in_order_and_tries_again():
    failures = {3: (grpc.StatusCode.INVALID_ARGUMENT, "not an image")}
    failures[5] = (grpc.StatusCode.UNAVAILABLE, "away")
    lock, running, most = threading.Lock(), 0, 0

    def answer(number, asked, context):
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.02)
        with lock:
            running -= 1
        return next((failures[n] for n in failures if asked.images == [image(n)]), None)

    async def main(url):
        async with AsyncGrpcClient(url) as client:
            images = (image(number) for number in range(20))
            return [found async for found in client.stream(images, concurrency=4, policy="high")]

    with grpc_server(answer) as (service, url):
        found = run(main(url))
    away, refused = found.pop(5), found.pop(3)
    assert type(away) is UnavailableError
    assert type(refused) is InvalidRequestError and str(refused) == "not an image"
    assert [answer.score for answer in found] == [n for n in range(20) if n not in (3, 5)]
    assert all(isinstance(answer, Prediction) for answer in found)
    assert len(service.asked) == 19 + 3 and all(len(asked.images) == 1 for asked in service.asked)
    assert {asked.parameters["policy"] for asked in service.asked} == {"high"}
    assert 2 <= most <= 4


def test_files_are_read_beside_the_event_loop(tmp_path):
    """A slow disk holds up no other task; a caller without an event loop reads them itself."""

    class Noted(os.PathLike):
        def __fspath__(self):
            readers.append(threading.get_ident())
            return str(tmp_path / "a.jpg")

    async def main(url):
        async with AsyncGrpcClient(url) as client:
            answers = [*(await client.infer([Noted(), Noted()]))]
            return answers + [found async for found in client.stream([Noted()])]

    readers = []
    (tmp_path / "a.jpg").write_bytes(image(7))
    with grpc_server() as (_, url):
        assert [answer.score for answer in run(main(url))] == [7, 7, 7]
        assert len(readers) >= 3 and threading.get_ident() not in readers
        readers.clear()
        with GrpcClient(url) as client:
            client.infer(Noted())
        assert set(readers) == {threading.get_ident()}


def test_a_cancelled_stream_cancels_its_requests_at_the_server():
    gone = threading.Semaphore(0)
    arrived = threading.Semaphore(0)

    def answer(number, asked, context):
        context.add_callback(gone.release)
        arrived.release()
        while context.is_active():
            time.sleep(0.01)

    async def main(url):
        async with AsyncGrpcClient(url) as client:

            async def take():
                async for _ in client.stream([image(0)] * 50, concurrency=3):
                    pass

            task = asyncio.create_task(take())
            for _ in range(3):
                await asyncio.to_thread(arrived.acquire, timeout=20)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            return [await asyncio.to_thread(gone.acquire, timeout=20) for _ in range(3)]

    with grpc_server(answer) as (service, url):
        assert run(main(url)) == [True] * 3
    assert len(service.asked) == 3
