"""Workers as Ray actors: one per GPU, or per so many cores, on one host or many (docs/scale.md).

Each has its GPU and its cores to itself and loads the models once. A sample is handed out to whoever is free. A worker
that dies costs the sample it had, which goes to another, and is replaced; a sample that fails `ATTEMPTS` times is given
up. Only this process writes, so a sample is in the results once, however often it was begun.
"""

from __future__ import annotations

import logging
import os
import socket
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # as Ray advises

import psutil
import ray
import torch
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from specextend.errors import ConfigError, SpecExtendError, WorkerError
from specextend.evaluation.environment import ROOT
from specextend.evaluation.plan import Plan, Task
from specextend.evaluation.records import SampleRecord, label
from specextend.evaluation.workers import Engines, Failure, LocalWorker, Unwatched, Watch
from specextend.models.checkpoints import one_line

ATTEMPTS = 3
OBJECT_STORE_BYTES = 128 << 20  # prompts and records are small
ANSWER_S = 5.0  # for a cluster to take a connection
END_S = 10.0  # for the processes of a cluster to end by themselves


@dataclass(frozen=True)
class Seat:
    """Room for one worker on a host.

    Args:
        node: Ray's id of the host.
        index: which share of the host's cores it has.
        neighbours: workers on the host, itself included.
        cpus, gpus: what it has to itself.
    """

    node: str
    index: int
    neighbours: int
    cpus: int
    gpus: int


def seats_of(
    nodes: Sequence[dict[str, Any]], *, use_gpus: bool, cpus_per_worker: int | None, max_workers: int | None
) -> list[Seat]:
    """Seats on the hosts of a cluster; where there are too many, every host gets its first before any gets a second.

    Args:
        nodes: as `ray.nodes()` lists them. A host with GPUs has a seat per GPU, any other one per `cpus_per_worker`.
    """
    seats = []
    for node in sorted((node for node in nodes if node["Alive"]), key=lambda node: node["NodeID"]):
        cpus, gpus = (int(node["Resources"].get(name, 0)) for name in ("CPU", "GPU"))
        gpus *= use_gpus
        each = cpus_per_worker or (max(1, cpus // gpus) if gpus else 1)
        room = min(gpus, cpus // each) if gpus else cpus // each
        seats += [Seat(node["NodeID"], index, room, each, int(gpus > 0)) for index in range(room)]
    seats = sorted(seats, key=lambda seat: seat.index)[:max_workers]
    on_host = Counter(seat.node for seat in seats)
    return [replace(seat, neighbours=on_host[seat.node]) for seat in seats]


class RayWorkers:
    """`Workers` on a Ray cluster; a context manager, which ends them and the cluster if it started one.

    Args:
        make: loads the models, in each worker; gives the engine of a method by its name.
        address: of a cluster that runs ("auto" finds the one on this host); None starts one on this host.
        device: "auto", "cuda" or "cpu".
        cpus_per_worker: cores per worker; None: one, beside a GPU an equal share of the host's.
        max_workers: None takes all there is room for.
    """

    def __init__(
        self, make: Callable[[], Engines], *, address: str | None = None, device: str = "auto",
        cpus_per_worker: int | None = None, max_workers: int | None = None,
    ):  # fmt: skip
        for name, value in (("cpus_per_worker", cpus_per_worker), ("max_workers", max_workers)):
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; it must be at least 1")
        if device not in ("auto", "cuda", "cpu"):
            raise ConfigError(f"device is {device!r} with Ray, which gives each worker its own GPU; use cuda or cpu")
        self._make, self._started, strangers = make, 0, set(_descendants(psutil.Process()))
        _join(address)
        self._daemons = [one for one in _descendants(psutil.Process()) if one not in strangers]
        seats = seats_of(
            ray.nodes(), use_gpus=device != "cpu", cpus_per_worker=cpus_per_worker, max_workers=max_workers
        )
        if not seats:
            self._leave()
            raise WorkerError(f"no host of the cluster has room for a worker of {cpus_per_worker or 1} cores")
        self._loading: dict[ray.ObjectRef, _Member] = {}
        self._ready: list[_Member] = []
        self._limit = 0
        for seat in seats:
            self._start(seat)

    def __enter__(self) -> RayWorkers:
        return self

    def __exit__(self, *_: object) -> None:
        for member in [*self._ready, *self._loading.values()]:
            ray.kill(member.actor)
        self._leave()

    def __len__(self) -> int:
        return len(self._ready) + len(self._loading)

    @property
    def limit(self) -> int:
        self.wait(1)
        return self._limit

    def manifest(self, plan: Plan) -> dict[str, Any]:
        while True:
            self.wait(1)
            try:
                return ray.get(self._ready[0].actor.manifest.remote(plan.without_prompts()))
            except RayTaskError as error:
                raise _of_the_callers_making(error) from error
            except RayError:  # it died while it had nothing to do
                self._replace(self._ready[0])

    def wait(self, count: int | None = None) -> None:
        """Until `count` workers, or all, have loaded the models."""
        while self._loading and (count is None or len(self._ready) < count):
            self._finish_loading(_first(self._loading))

    def measure(self, plan: Plan, tasks: Sequence[Task], watch: Watch) -> Iterator[tuple[Task, SampleRecord | Failure]]:
        plan = plan.without_prompts()
        queue, attempts = deque(tasks), Counter()
        work: dict[ray.ObjectRef, tuple[_Member, Task]] = {}
        while queue or work:
            busy = {member for member, _ in work.values()}
            for member in [one for one in self._ready if one not in busy][: len(queue)]:
                task = queue.popleft()
                watch.begin(task, "measuring")
                work[member.actor.measure.remote(plan, task)] = member, task
            done = _first([*work, *self._loading])
            if done in self._loading:
                self._finish_loading(done)
                continue
            member, task = work.pop(done)
            try:
                record = ray.get(done)
            except RayError as error:
                self._replace(member)  # also after an exception: a GPU that has faulted stays faulty
                attempts[task.key] += 1
                reason = _reason(error)
                if attempts[task.key] == ATTEMPTS:
                    yield task, Failure(f"{ATTEMPTS} attempts, at last: {reason}")
                else:
                    watch.note(f"{label(task.key)} failed in worker {member.number} ({reason}); it goes to another")
                    queue.append(task)
            else:
                yield task, record

    def _leave(self) -> None:
        """End a cluster that `_join` started with all its processes, which Ray does not always; leave another."""
        started = {other for one in self._daemons for other in (one, *_descendants(one))}
        ray.shutdown()
        for one in psutil.wait_procs(started, timeout=END_S)[1]:
            with suppress(psutil.NoSuchProcess):
                one.kill()

    def _start(self, seat: Seat, deaths: int = 0) -> None:
        """Begin to load the models in a new worker."""
        placement = NodeAffinitySchedulingStrategy(seat.node, soft=False)
        options = {"num_cpus": seat.cpus, "num_gpus": seat.gpus, "scheduling_strategy": placement}
        actor = ray.remote(_Actor).options(**options).remote(self._started, seat)
        member = _Member(self._started, seat, actor, deaths)
        self._started += 1
        self._loading[actor.load.remote(self._make)] = member

    def _finish_loading(self, done: ray.ObjectRef) -> None:
        """Take a worker into service; one that failed to load the models gets a successor, `ATTEMPTS` in all."""
        member = self._loading.pop(done)
        try:
            self._limit = ray.get(done)
        except RayError as error:
            ray.kill(member.actor)
            if isinstance(error, RayTaskError) and not self._limit:  # no worker has loaded them yet: it is the flags
                raise _of_the_callers_making(error) from error
            if member.deaths + 1 < ATTEMPTS:
                self._start(member.seat, member.deaths + 1)
            elif not len(self):
                raise WorkerError(
                    f"no worker is left: the last one failed to load the models ({_reason(error)}); fewer "
                    "workers (--max_workers) need less memory"
                ) from error
        else:
            self._ready.append(member)

    def _replace(self, member: _Member) -> None:
        self._ready.remove(member)
        ray.kill(member.actor)
        self._start(member.seat)


@dataclass(frozen=True, eq=False)
class _Member:
    """A worker as this process sees it; `deaths`: of its predecessors on the seat while they loaded."""

    number: int
    seat: Seat
    actor: Any
    deaths: int


class _Actor:
    """A worker as it sees itself: a `LocalWorker` that keeps to its cores."""

    def __init__(self, number: int, seat: Seat):
        self._number, self._seat = number, seat

    def load(self, make: Callable[[], Engines]) -> int:
        """Load the models; prompt plus new tokens they hold."""
        _keep_to_cores(self._seat)
        engines = make()
        self._local = LocalWorker(engines, number=self._number, workers_on_host=self._seat.neighbours)
        return self._local.limit

    def manifest(self, plan: Plan) -> dict[str, Any]:
        return self._local.manifest(plan)

    def measure(self, plan: Plan, task: Task) -> SampleRecord:
        ((_, record),) = self._local.measure(plan, [task], Unwatched())
        return record


def _keep_to_cores(seat: Seat) -> None:
    """Bind all threads of this process, and those to come, to the seat's share of the cores (Linux)."""
    torch.set_num_threads(seat.cpus)
    tasks = Path("/proc/self/task")
    if not tasks.is_dir():
        return
    cores = sorted(os.sched_getaffinity(0))[seat.index * seat.cpus :][: seat.cpus]
    if len(cores) < seat.cpus:
        raise WorkerError(
            f"{os.cpu_count()} cores are not enough for worker {seat.index + 1} with {seat.cpus} of its own; "
            "start Ray with the number of cores there are (--num-cpus)"
        )
    for thread in tasks.iterdir():
        os.sched_setaffinity(int(thread.name), cores)


def _descendants(process: psutil.Process) -> list[psutil.Process]:
    """All processes that descend from `process`; none where it has ended."""
    with suppress(psutil.NoSuchProcess):
        return process.children(recursive=True)
    return []


def _join(address: str | None) -> None:
    # where this checkout is, also for workers of a cluster, whose hosts see it at the same place or have it installed
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    options = {
        "log_to_driver": False,
        "logging_level": logging.ERROR,
        "runtime_env": {"env_vars": {"PYTHONPATH": path}},
    }
    if address is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        local = {"include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
        ray.init("local", num_cpus=cores, **local, **options)
        return
    try:
        if ":" in address:  # Ray itself would try for minutes
            host, _, port = address.rpartition(":")
            socket.create_connection((host, int(port)), timeout=ANSWER_S).close()
        ray.init(address, **options)
    except (OSError, RuntimeError, ValueError) as error:
        raise WorkerError(
            f"no Ray cluster answers at {address!r} ({one_line(error, 120)}); start one with `ray start --head`, set "
            "RAY_AUTH_MODE=token if it asks for a token, or use --ray, which starts one itself"
        ) from error


def _first(refs: Any) -> ray.ObjectRef:
    """The first of `refs` that is done."""
    done, _ = ray.wait(list(refs), num_returns=1)
    return done[0]


def _of_the_callers_making(error: RayTaskError) -> Exception:
    """What a worker raised outside of any sample: a mistake in the flags is one here, too."""
    if isinstance(error.cause, SpecExtendError):
        return error.cause
    return WorkerError(f"a worker could not begin: {_reason(error)}")


def _reason(error: RayError) -> str:
    if isinstance(error, RayTaskError):
        return f"{type(error.cause).__name__}: {one_line(error.cause)}"
    detail = str(error).rpartition("Worker exit detail: ")[2]
    return f"the worker died: {one_line(Exception(detail), 120)}"
