"""A program that uses clients as users do: forks, pools, event loops, very many threads.

`python -m tests.unit.client_program SCENARIO KIND URL` prints what it saw as one JSON object. It is
a process of its own because forks, descriptors and gRPC's threads are properties of a process.
"""

import asyncio
import ctypes
import json
import multiprocessing
import os
import resource
import sys
import threading
import time
import traceback
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import grpc

from client import AsyncGrpcClient, ForkedError, GrpcClient, HttpClient, forks
from tests.unit.client_servers import HALVES, HALVES_TO_THE_END, HELD, SLOW, image

KINDS = {"grpc": GrpcClient, "http": HttpClient}
WORKERS = 4
PATIENCE_S = 20.0
MOST_DESCRIPTORS = 256
_client = None


def shared(kind, url):
    """The client of this process, or the one that it inherited."""
    global _client
    if _client is None:
        _client = KINDS[kind](url)
    return _client


def ask(client, first, count=12):
    """Single images and a batch: what was asked, what came back, over which ports."""
    numbers = [*range(first, first + count)]
    found = [client.infer([image(number)], timeout_s=PATIENCE_S)[0] for number in numbers]
    numbers += range(first, first + 40)  # more than the server takes at once
    found += client.infer([image(number) for number in numbers[count:]], timeout_s=PATIENCE_S)
    wrong = [(n, f.score) for n, f in zip(numbers, found, strict=True) if f.score != n]
    return wrong, len(found), sorted({int(f.embedding[0]) for f in found})


def ask_as_worker(kind, url, first):
    return ask(shared(kind, url), first)


def run_in_fork(call, fork=os.fork):
    """What `call()` returns in a forked child, or its traceback; None if it never ends."""
    reader, writer = os.pipe()
    child = fork()
    if child == 0:
        os.close(reader)
        try:
            found = call()
        except BaseException:
            found = traceback.format_exc()
        os.write(writer, json.dumps(found).encode())
        os._exit(0)
    os.close(writer)
    return child, reader


def result_of(child, reader):
    ended = threading.Timer(PATIENCE_S, os.kill, (child, 9))
    ended.start()
    with open(reader, "rb") as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    ended.cancel()
    return json.loads(text) if text else "hung"


def report(client, before, children):
    after = ask(client, 0)
    return {"before": before, "children": children, "after": after}


def fork(kind, url):
    """Children that use the parent's client in threads, and one of their own, while it asks."""
    client = shared(kind, url)
    (wrong, count, ports), stop = ask(client, 0), threading.Event()
    parents = set(ports)

    def go_on():
        while not stop.is_set():
            wrongs, _, ports = ask(client, 5000, 3)
            wrong.extend(wrongs)
            parents.update(ports)

    asking = [threading.Thread(target=go_on) for _ in range(2)]
    for thread in asking:
        thread.start()

    def child(first):
        def call():
            with KINDS[kind](url) as own, ThreadPoolExecutor(3) as pool:
                asked = ((client, first), (client, first + 100), (own, first + 200))
                return list(pool.map(lambda one: ask(*one), asked))

        return call

    running = [run_in_fork(child(1000 * number)) for number in range(1, 1 + WORKERS)]
    answers = [result_of(*one) for one in running]
    stop.set()
    for thread in asking:
        thread.join()
    children = [one for some in answers for one in (some if isinstance(some, list) else [some])]
    return report(client, (wrong, count, sorted(parents)), children)


def multiprocess(kind, url, method):
    before = ask(shared(kind, url), 0)
    context = multiprocessing.get_context(method)
    with ProcessPoolExecutor(WORKERS, mp_context=context) as pool:
        jobs = [pool.submit(ask_as_worker, kind, url, 1000 * n) for n in range(1, 1 + 2 * WORKERS)]
        children = [job.result(timeout=3 * PATIENCE_S) for job in jobs]
    return report(shared(kind, url), before, children)


def in_flight(kind, url, wait_s):
    """Fork while a request of a second is in flight, which the fork may wait for so long."""
    forks.FORK_WAIT_S = wait_s
    client = shared(kind, url)
    client.infer([image(1)])
    asking = threading.Thread(target=client.infer, args=([image(SLOW)],))
    asking.start()
    time.sleep(0.2)
    started = time.monotonic()
    child = run_in_fork(lambda: refused(lambda: ask(client, 0, 1)))
    waited_s = time.monotonic() - started
    found = result_of(*child)
    asking.join()
    return {"waited_s": waited_s, "child": found, "after": ask(client, 0)}


def opening(kind, url, what):
    """Fork while a thread opens a channel, or closes one, which takes a second here."""
    began, ended = threading.Event(), threading.Event()

    def slow(call):
        def instead(*arguments, **options):
            began.set()
            time.sleep(1)
            ended.set()
            return call(*arguments, **options)

        return instead

    if what == "open":
        grpc.insecure_channel = slow(grpc.insecure_channel)
        work = threading.Thread(target=GrpcClient, args=(url,))
    else:
        client = GrpcClient(url)
        client._line.channel.close = slow(client._line.channel.close)
        work = threading.Thread(target=client.close)
    work.start()
    began.wait()
    child = run_in_fork(lambda: ask(shared(kind, url), 0, 1))
    return {"waited": ended.is_set(), "child": result_of(*child)}


def reading(kind, url, number):
    """Fork while a thread waits for an answer, or for the rest of one."""
    client, found = shared(kind, url), []
    client.infer([image(1)])
    asking = threading.Thread(target=lambda: found.extend(client.infer([image(number)])))
    asking.start()
    time.sleep(0.3)
    child = run_in_fork(lambda: [sockets(), ask(client, 0, 1)])
    return {"child": result_of(*child), "asked": asking.join() or [one.score for one in found]}


def sockets():
    """How many are open in this process."""
    names = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
    return sum(os.path.lexists(n) and os.readlink(n).startswith("socket:") for n in names)


def failing(kind, url):
    """Fork with two holders of connections that both fail to forget them."""

    class Holder:
        forgotten = False

        def forget(self):
            self.forgotten = True
            raise RuntimeError

    holders = [Holder(), Holder()]
    for holder in holders:
        forks.forget_after_fork(holder)
    return result_of(*run_in_fork(lambda: [holder.forgotten for holder in holders]))


def fork_in_c(kind, url):
    """Children of C code that calls no hooks of Python's, as uWSGI forks its workers."""
    client = shared(kind, url)
    before = ask(client, 0)
    fork = ctypes.PyDLL(None).fork

    def child(first):
        def call():
            found = ask(client, first)
            client.close()
            return found

        return call

    running = [run_in_fork(child(1000 * n), fork) for n in range(1, 1 + WORKERS)]
    return report(client, before, [result_of(*one) for one in running])


def asyncio_fork(kind, url):
    """Fork from an event loop's own thread while 20 requests are awaited, and after."""

    async def main():
        client = AsyncGrpcClient(url)
        await client.infer([image(1)])
        asked = [asyncio.create_task(client.infer([image(number)])) for number in range(19)]
        asked.append(asyncio.create_task(client.infer([image(SLOW)])))
        await asyncio.sleep(0.2)
        started = time.monotonic()
        children = [
            run_in_fork(lambda: refused(lambda: ask(GrpcClient(url), 0, 1))),
            run_in_fork(lambda: asyncio.run(one_answer(url, 7, client))),
        ]
        waited_s = time.monotonic() - started
        ours = [found[0].score for found in await asyncio.gather(*asked)]
        return {"waited_s": waited_s, "ours": ours, "children": [result_of(*c) for c in children]}

    return asyncio.run(main()) | {
        "then": result_of(*run_in_fork(lambda: asyncio.run(one_answer(url, 8))))
    }


def closed(kind, url):
    """Fork right after a channel was closed, and a while after."""
    GrpcClient(url).close()
    started = time.monotonic()
    child = run_in_fork(lambda: ask(GrpcClient(url), 0, 1))
    at_once_s = time.monotonic() - started
    time.sleep(0.1)
    started = time.monotonic()
    later = run_in_fork(lambda: None)
    later_s = time.monotonic() - started
    result_of(*later)
    return {"child": result_of(*child), "at_once_s": at_once_s, "later_s": later_s}


async def one_answer(url, number, client=None):
    async with client or AsyncGrpcClient(url) as client:
        return (await client.infer([image(number)], timeout_s=PATIENCE_S))[0].score


def refused(call):
    try:
        return call()
    except ForkedError as error:
        return str(error)


# --- descriptors -------------------------------------------------------------------------------


class Descriptors:
    def __init__(self):
        self.looking = threading.Lock()
        self.before = self.now()
        self.most = 0

    def now(self):
        return len(os.listdir("/proc/self/fd"))

    def look(self):
        with self.looking:  # a look at them is a descriptor itself
            self.most = max(self.most, self.now())

    def after(self):
        """Once nothing closes any more: gRPC does so in a thread of its own."""
        until = time.monotonic() + 5
        while self.now() > self.before and time.monotonic() < until:
            time.sleep(0.02)
        return {"before": self.before, "most": self.most, "after": self.now()}


def threads(kind, url, number, at_once, asked=None):
    """A shared client and a thread per request: about images of their own, or all about one."""
    limit_descriptors()
    seen, wrong = Descriptors(), []
    client = KINDS[kind](url)

    def call(n):
        n = n if asked is None else asked
        score = client.infer([image(n)], timeout_s=PATIENCE_S)[0].score
        seen.look()
        if score != n:
            wrong.append((n, score))

    for first in range(0, number, at_once):
        batch = [threading.Thread(target=call, args=(first + n,)) for n in range(at_once)]
        for thread in batch:
            thread.start()
        for thread in batch:
            thread.join()
    client.close()
    return {**seen.after(), "wrong": wrong}


def event_loops(_, url):
    """One event loop after the other, and 200 requests at once in the last."""
    limit_descriptors()
    asyncio.run(one_answer(url, 1))
    seen = Descriptors()
    wrong = [n for n in range(40) if asyncio.run(one_answer(url, n)) != n]

    async def at_once():
        async with AsyncGrpcClient(url) as client:
            found = await asyncio.gather(*(client.infer([image(n)]) for n in range(200)))
            seen.look()
            return [n for n, (answer,) in enumerate(found) if answer.score != n]

    wrong += asyncio.run(at_once())
    return {**seen.after(), "wrong": wrong}


def limit_descriptors():
    resource.setrlimit(resource.RLIMIT_NOFILE, (MOST_DESCRIPTORS, MOST_DESCRIPTORS))


SCENARIOS = {
    "fork": fork,
    "pool-fork": lambda kind, url: multiprocess(kind, url, "fork"),
    "pool-spawn": lambda kind, url: multiprocess(kind, url, "spawn"),
    "pool-forkserver": lambda kind, url: multiprocess(kind, url, "forkserver"),
    "in-flight": lambda kind, url: in_flight(kind, url, 10.0),
    "in-flight-too-long": lambda kind, url: in_flight(kind, url, 0.1),
    "opening": lambda kind, url: opening(kind, url, "open"),
    "closing": lambda kind, url: opening(kind, url, "close"),
    "closed": closed,
    "waiting": lambda kind, url: reading(kind, url, SLOW),
    "reading": lambda kind, url: reading(kind, url, HALVES),
    "reading-to-the-end": lambda kind, url: reading(kind, url, HALVES_TO_THE_END),
    "failing": failing,
    "fork-in-c": fork_in_c,
    "asyncio-fork": asyncio_fork,
    "threads": lambda kind, url: threads(kind, url, 1200, 4),
    "threads-at-once": lambda kind, url: threads(kind, url, 200, 200, HELD),
    "event-loops": event_loops,
}

if __name__ == "__main__":
    scenario, kind, url = sys.argv[1:]
    sys.stdout.write(json.dumps(SCENARIOS[scenario](kind, url)))
    sys.stdout.flush()
    os._exit(0)  # also where a thread hangs
