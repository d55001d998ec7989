"""Claims about the table of foreign exceptions: each row knows an exception that the thing itself raised, where a machine without a GPU
can make it raise one; else one of its class with the text of its source. All travel as in the product."""

import ast
import concurrent.futures
import errno
import inspect
import io
import mmap
import multiprocessing
import os
import pickle
import resource
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray.exceptions
import torch
import torch.distributed as dist
from ray.core.generated.common_pb2 import ActorDiedErrorContext, NodeDeathInfo
from ray.exceptions import ActorDiedError, RayActorError, RayTaskError
from ray.train.v2._internal import exceptions as ray_train
from ray.train.v2._internal.callbacks.nccl_ras import RASQueryError
from ray.train.v2._internal.execution.checkpoint.sync_actor import SynchronizationBarrierResetError
from ray.train.v2.api import exceptions as ray_train_api
from ray.train.v2.api.preemption import PreemptionInfo

from cluster.failures import Failure, RankError, _row, described, root_cause, sentence_of
from cluster.foreign import ROWS
from cluster.launch import failure_of
from cluster.storage import StorageOutage, StorageRefused
from tests.cluster.told import failure_on_a_rank, through_a_pipe

PROJECT = Path(__file__).resolve().parents[2]


def raised(action: Callable[[], object]) -> RankError:
    try:
        action()
    except BaseException as error:
        return described(error)
    raise AssertionError("nothing was raised")


# Things that really go wrong


def read_from_nowhere() -> None:
    descriptor = os.open("/proc/self/mem", os.O_RDONLY)
    try:
        os.pread(descriptor, 1, 0)  # no page is mapped there
    finally:
        os.close(descriptor)


def write_to_a_full_disk() -> None:
    with open("/dev/full", "wb", buffering=0) as file:
        file.write(b"x")


def connect_to_nobody() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = probe.getsockname()
    socket.create_connection(address).close()


def hear_from_a_peer_that_died() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as ours:
        theirs, _ = server.accept()
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        theirs.close()  # with a reset
        ours.recv(1)


def write_into_a_pipe_that_nobody_reads() -> None:
    readable, writable = os.pipe()
    os.close(readable)
    try:
        os.write(writable, b"x")
    finally:
        os.close(writable)


def accept_for_a_moment() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.01)
        server.accept()


def open_more_files_than_allowed() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, before[1]))
    try:
        os.open(os.devnull, os.O_RDONLY)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def arrow_to_a_full_disk() -> None:
    with pa.OSFile("/dev/full", "wb") as file:
        file.write(b"x")


def lose_a_helper() -> None:
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        pool.submit(os._exit, 1).result()


def decode_what_is_no_image() -> None:
    from nvidia.dali import fn, pipeline_def

    @pipeline_def(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1)  # type: ignore[untyped-decorator]
    def pipeline() -> Any:
        return fn.decoders.image(fn.external_source(lambda _: [np.zeros(100, np.uint8)]), device="cpu")

    built = pipeline()
    built.build()
    built.run()


def of_dynamo(name: str) -> RankError:
    """As `described` says an exception of torch._dynamo; to import that takes seconds."""
    source = Path(torch.__file__).parent / "_dynamo" / "exc.py"
    bases = {
        each.name: [ast.unparse(base) for base in each.bases]
        for each in ast.parse(source.read_text()).body
        if isinstance(each, ast.ClassDef)
    }
    above: list[str] = []
    while (above[-1] if above else name) in bases:
        above += bases[above[-1] if above else name]
    assert above[-1] == "RuntimeError"
    return RankError(
        name=name, bases=(*(f"torch.{each}" for each in above[:-1]), "RuntimeError"), message=name, traceback="", package="torch"
    )


def task_error(cause: BaseException | None = None) -> BaseException:
    return RayTaskError("work", "Traceback: in work", cause)


def preempted_actor() -> BaseException:
    reason = NodeDeathInfo(reason=NodeDeathInfo.AUTOSCALER_DRAIN_PREEMPTED)
    return ActorDiedError(ActorDiedErrorContext(error_message="its node went", actor_id=b"0" * 16, node_death_info=reason))


RAY: dict[type[BaseException], Callable[[], BaseException]] = {
    ray.exceptions.RayTaskError: task_error,
    ray.exceptions.CrossLanguageError: lambda: ray.exceptions.CrossLanguageError(
        type("Theirs", (), {"formatted_exception_string": "java.lang.Error", "language": 1})
    ),
    ray.exceptions.ActorUnavailableError: lambda: ray.exceptions.ActorUnavailableError("away", b"0" * 16),
    ray_train.WorkerHealthCheckFailedError: lambda: ray_train.WorkerHealthCheckFailedError("x", failure=ActorDiedError()),
    ray_train.WorkerGroupStartupTimeoutError: lambda: ray_train.WorkerGroupStartupTimeoutError(2),
    ray_train.BroadcastCollectiveTimeoutError: lambda: ray_train.BroadcastCollectiveTimeoutError(1.0, [1], 1.0),
    ray_train.UserExceptionWithTraceback: lambda: ray_train.UserExceptionWithTraceback(KeyError("x"), "Traceback: in work"),
    ray_train_api.WorkerGroupError: lambda: ray_train_api.WorkerGroupError("x", {}),
    ray_train_api.NCCLHangError: lambda: ray_train_api.NCCLHangError("x", {}),
    ray_train_api.PreemptionError: lambda: ray_train_api.PreemptionError(
        PreemptionInfo(deadline_ms=None, preempted_node_to_ranks={"node": [0]})
    ),
    ray_train_api.ControllerError: lambda: ray_train_api.ControllerError(ActorDiedError()),
}
"""Those of Ray's exceptions that want more than some words."""


def made(kind: type[BaseException]) -> BaseException:
    """An instance of a class of Ray's."""
    if kind in RAY:
        return RAY[kind]()
    if not inspect.isfunction(kind.__init__):
        return kind("x")
    wanted = [each for each in inspect.signature(kind).parameters.values() if each.default is each.empty]
    return kind(*("6f" * 14 if each.name == "object_ref_hex" else "x" for each in wanted if each.kind is each.POSITIONAL_OR_KEYWORD))


def exceptions_in(module: Any) -> list[type[BaseException]]:
    return [
        each
        for name, each in sorted(vars(module).items())
        if isinstance(each, type) and issubclass(each, BaseException) and not name.startswith("_") and each.__module__.startswith("ray")
    ]


ALL_OF_RAY = [
    *dict.fromkeys(
        [
            *exceptions_in(ray.exceptions),
            *exceptions_in(ray_train),
            *exceptions_in(ray_train_api),
            RASQueryError,
            SynchronizationBarrierResetError,
        ]
    )
]

LOST = "a lost rank, in words"
MADE: dict[str, list[Callable[[], RankError]]] = {
    # torch and what it calls; a GPU's errors as torch (c10/cuda), cuBLAS, cuDNN and NCCL word them
    "GPU memory": [lambda: described(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total ..."))],
    "GPU memory, in a library": [
        lambda: described(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")),
        lambda: described(RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`")),
        lambda: described(torch.AcceleratorError("CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation' in ...")),
        lambda: described(
            RuntimeError("Critical error in pipeline:\nCUDA runtime API error cudaErrorMemoryAllocation (2):\nout of memory")
        ),
    ],
    "memory of the node": [
        lambda: raised(lambda: bytearray(1 << 60)),
        lambda: raised(lambda: np.empty(1 << 55)),
        lambda: raised(lambda: pa.allocate_buffer(1 << 60)),
    ],
    "memory of the node, in torch": [lambda: raised(lambda: torch.empty(1 << 55))],
    "memory of the node, in the kernel": [lambda: raised(lambda: mmap.mmap(-1, 1 << 62))],
    "an index out of range on the GPU": [lambda: described(torch.AcceleratorError("CUDA error: device-side assert triggered"))],
    "GPU without a fitting driver or build": [
        lambda: described(torch.AcceleratorError("CUDA error: no kernel image is available for execution on the device")),
        lambda: described(RuntimeError("Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU")),
    ],
    "GPU that failed": [
        partial(lambda words: described(torch.AcceleratorError(f"CUDA error: {words}")), words)
        for words in (
            "uncorrectable ECC error encountered",
            "uncorrectable NVLink error detected during the execution",
            "unspecified launch failure",
            "an illegal memory access was encountered",
            "unknown error",
            "CUDA-capable device(s) is/are busy or unavailable",
        )
    ]
    + [
        lambda: described(RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED")),
        lambda: described(dist.DistBackendError("NCCL error: unhandled cuda error\nncclUnhandledCudaError: Call to CUDA function failed.")),
    ],
    "GPU, any other error": [
        lambda: described(torch.AcceleratorError("CUDA error: invalid argument")),
        lambda: described(RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if ...")),
        lambda: described(RuntimeError("CUDA error: CUBLAS_STATUS_INVALID_VALUE when calling `cublasSgemm(...)`")),
    ],
    # c10d, gloo and NCCL; the real ones of gloo are in test_what_a_lost_peer_raises
    "a network interface that is not there": [
        lambda: described(dist.DistBackendError("ncclInternalError: Bootstrap : no socket interface found")),
    ],
    "ranks that call different collectives": [
        lambda: described(RuntimeError("[enforce fail at gloo/transport/tcp/pair.cc:446] op.preamble.length <= op.nbytes. 256 vs 16")),
        lambda: described(RuntimeError("Detected mismatch between collectives on ranks. Rank 0 is running collective: ...")),
        lambda: described(dist.DistBackendError("ncclInvalidUsage: This usually reflects invalid usage of NCCL library.")),
    ],
    LOST: [
        partial(lambda words: described(dist.DistBackendError(words)), words)
        for words in (
            "NCCL communicator was aborted on rank 1.",
            "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely.",
            "ncclSystemError: System call (e.g. socket, malloc) or external library call failed or device error.",
            "ncclInternalError: Internal check failed.",
            "[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7, OpType=ALLREDUCE) ran for 600000 milliseconds",
        )
    ],
    "a lost rank, by c10d's class": [lambda: described(dist.DistStoreError("of a new wording"))],
    # helpers
    "a helper process that died": [
        lambda: raised(lose_a_helper),
        lambda: described(RuntimeError("DataLoader worker (pid(s) 4242) exited unexpectedly")),
    ],
    "a thread that cannot start": [lambda: described(RuntimeError("can't start new thread"))],
    "torch.compile": [lambda: of_dynamo("Unsupported"), lambda: of_dynamo("BackendCompilerFailed")],
    "DALI": [lambda: raised(decode_what_is_no_image)],
    "an interrupt from outside": [lambda: raised(lambda: signal.raise_signal(signal.SIGINT))],
    # pyarrow
    "pyarrow was interrupted": [lambda: described(pa.ArrowCancelled("Operation cancelled"))],
    "pyarrow": [
        lambda: raised(lambda: pq.read_table(pa.BufferReader(b"PAR1" + b"0" * 100 + b"PAR1"))),
        lambda: raised(lambda: pa.array([1, "a"])),
        lambda: raised(lambda: pa.array([1]).cast(pa.list_(pa.int8()))),
        lambda: described(pa.ArrowCapacityError("array cannot contain more than 2147483646 bytes, have 3145728000")),
    ],
    # the operating system
    "a certificate that is not trusted": [lambda: described(ssl.SSLCertVerificationError(1, "certificate verify failed: self-signed"))],
    "an encrypted connection or a name's address": [
        lambda: raised(lambda: socket.getaddrinfo("256.0.0.1", 1, flags=socket.AI_NUMERICHOST)),
        lambda: described(ssl.SSLError(1, "[SSL] record layer failure")),  # 1 is EPERM elsewhere
    ],
    "a disk is full": [
        lambda: raised(write_to_a_full_disk),
        lambda: raised(arrow_to_a_full_disk),
        lambda: described(OSError(errno.EDQUOT, "Disk quota exceeded")),
    ],
    "a disk or a file refuses": [
        partial(lambda number: described(OSError(number, os.strerror(number))), number)
        for number in (errno.EACCES, errno.EPERM, errno.EROFS)
    ],
    "a file may not be used, without a number": [lambda: described(PermissionError("not yours"))],
    "too many open files": [lambda: raised(open_more_files_than_allowed)],
    "a call on the operating system that is wrong": [
        lambda: raised(lambda: os.stat("/nowhere/at/all")),
        lambda: raised(lambda: os.listdir(os.devnull)),
        lambda: raised(lambda: os.close(10**6)),
    ],
    "a file that is not there or not of the kind, without a number": [
        lambda: described(FileNotFoundError("labels.csv")),
        lambda: raised(lambda: io.BytesIO().fileno()),
    ],
    "a disk, a mount or a network that failed": [
        lambda: raised(read_from_nowhere),
        lambda: raised(connect_to_nobody),
        lambda: raised(hear_from_a_peer_that_died),
        lambda: raised(write_into_a_pipe_that_nobody_reads),
        lambda: raised(accept_for_a_moment),
        lambda: described(OSError(errno.ESTALE, "Stale file handle")),
        lambda: described(OSError("When reading 'x' in bucket 'b': AWS Error NETWORK_CONNECTION during HeadObject operation: curlCode: 7")),
    ],
}
OF_RAY = {row.name for row in ROWS if any(name.startswith("ray.") for name in row.classes)}


def test_every_row_has_an_exception_here() -> None:
    names = [row.name for row in ROWS]
    assert len(names) == len(set(names))
    assert set(names) == set(MADE) | OF_RAY


@pytest.mark.parametrize("name", MADE)
def test_an_exception_meets_its_row_and_no_other(name: str) -> None:
    (row,) = [row for row in ROWS if row.name == name]
    for make in MADE[name]:
        told = through_a_pipe(make())
        found = _row(told)
        assert found is not None, told.message
        assert found.name == name, told.message
        failure = failure_on_a_rank(told, 3)
        assert (failure.kind, failure.rank, failure.fix, failure.is_echo) == (row.kind, 3, row.fix, row.is_echo)


@pytest.fixture(scope="module")
def lost() -> dict[str, RankError]:
    command = [sys.executable, "-m", "tests.cluster.lost_peers"]
    done = subprocess.run(command, cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True, timeout=120)
    cases: dict[str, RankError] = pickle.loads(done.stdout)
    return cases


def test_what_a_lost_peer_raises_is_retried_and_gives_way_to_the_cause(lost: dict[str, RankError]) -> None:
    assert _row(lost["wrong interface"]).name == "a network interface that is not there"  # type: ignore[union-attr]
    assert _row(lost["no memory"]).name == "memory of the node, in torch"  # type: ignore[union-attr]
    peers = {name: told for name, told in lost.items() if name not in ("wrong interface", "no memory")}
    assert len(peers) == 8
    dead = Failure(kind="infrastructure", rank=1, message="killed (SIGKILL)")
    for name, told in peers.items():
        failure = failure_on_a_rank(told)
        assert failure.kind == "infrastructure", (name, told.message)
        assert root_cause([failure, dead]) == dead, name


# Ray


def test_every_class_of_ray_is_a_decision() -> None:
    told = frozenset[str]().union(*(row.classes for row in ROWS))
    assert {f"ray.{kind.__name__}" for kind in ALL_OF_RAY} - told == set()
    assert {name for name in told if name.startswith("ray.")} - {f"ray.{kind.__name__}" for kind in ALL_OF_RAY} == set()  # no name of old


@pytest.mark.parametrize("kind", ALL_OF_RAY, ids=lambda kind: kind.__name__)
def test_an_exception_of_ray_means_what_its_row_says(kind: type[BaseException]) -> None:
    error = made(kind)
    row = next(row for row in ROWS if f"ray.{kind.__name__}" in row.classes)
    failure = failure_of(error)
    unwraps = (ray_train.UserExceptionWithTraceback, ray_train_api.ControllerError, ray_train.WorkerHealthCheckFailedError)
    assert failure.kind == ("user" if kind is unwraps[0] else "infrastructure" if kind in unwraps else row.kind)
    assert (sentence_of(error) is None) == (failure.kind == "user")
    if kind not in unwraps:
        assert failure_on_a_rank(error).kind == row.kind
    if kind not in (ray.exceptions.CrossLanguageError, ray.exceptions.RayChannelTimeoutError):  # which cannot be pickled
        assert failure_of(ray_train_api.ControllerError(pickle.loads(pickle.dumps(error)))).kind == failure.kind


def test_what_ray_wraps_is_what_counts() -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    for wrapped in (
        task_error(full),
        RayTaskError("work", "t", full).as_instanceof_cause(),
        ray_train_api.ControllerError(task_error(full)),
    ):
        failure = failure_of(wrapped)
        assert (failure.kind, failure.message) == ("storage", "OSError: [Errno 28] No space left on device")


def test_an_actor_whose_node_was_reclaimed_is_preempted_and_another_is_not() -> None:
    checked = ray_train.WorkerHealthCheckFailedError("x", failure=preempted_actor())
    for error in (preempted_actor(), checked, RayActorError(preempted=True)):
        assert failure_of(error).kind == "preempted"
    assert failure_of(ActorDiedError()).kind == "infrastructure"


def test_memory_of_a_gpu_is_not_ray_s_memory_of_a_node() -> None:
    ours, theirs = torch.OutOfMemoryError("CUDA out of memory."), ray.exceptions.OutOfMemoryError("the node is low on memory")
    assert type(ours).__name__ == type(theirs).__name__
    assert (failure_on_a_rank(ours).kind, failure_on_a_rank(theirs).kind) == ("user", "infrastructure")


# torch and pyarrow


def test_every_exception_of_torch_and_pyarrow_has_a_row_or_is_left_to_its_text() -> None:
    by_text = {"AcceleratorError", "CudaError", "DistError"}  # RuntimeErrors of many meanings
    by_cause = {"DeferredCudaCallError"}  # raised from one of those
    of_code = {"FatalError", "JITException", "Error"}  # the user's
    for module in (torch, torch.cuda, dist, pa.lib):
        for name, kind in vars(module).items():
            if isinstance(kind, type) and issubclass(kind, BaseException) and not name.startswith("_") and kind.__module__ != "builtins":
                known = _row(described(kind("x"))) if kind.__name__ not in by_text | by_cause | of_code | {"Empty"} else True
                assert known, kind


def test_a_cuda_error_that_was_put_off_means_what_it_was_raised_from() -> None:
    def call() -> None:
        try:
            raise torch.AcceleratorError("CUDA error: unknown error")
        except RuntimeError as error:
            raise torch.cuda.DeferredCudaCallError("CUDA call failed lazily at initialization") from error

    assert failure_on_a_rank(raised(call)).kind == "infrastructure"


# What no row knows


def test_what_nobody_knows_is_the_user_s_wherever_it_was_raised() -> None:
    def look_up() -> None:
        np.linalg.inv(np.zeros((2, 2)))  # innermost frame: a library's

    for make in (look_up, lambda: {}["x"], lambda: torch.ones(2) @ torch.ones(3)):
        failure = failure_on_a_rank(raised(make))
        assert (failure.kind, failure.is_explained) == ("user", False)


def test_an_unknown_exception_means_what_it_was_raised_from_and_a_known_one_what_it_is() -> None:
    def wrap(outer: BaseException, inner: BaseException) -> RankError:
        outer.__cause__ = inner
        return described(outer)

    outage = StorageOutage("no answer")
    assert failure_on_a_rank(wrap(ValueError("cannot read"), outage)).kind == "infrastructure"
    between = LookupError("x")
    assert failure_on_a_rank(wrap(ValueError("cannot read"), between)).kind == "user"
    between.__cause__ = OSError(errno.EIO, "x")
    assert failure_on_a_rank(wrap(ValueError("cannot read"), between)).kind == "infrastructure"
    assert failure_on_a_rank(wrap(StorageRefused("no"), outage)).kind == "storage"
    loop = ValueError("a")
    assert failure_on_a_rank(wrap(loop, loop)).kind == "user"


# What a driver says that lost its cluster


def test_a_driver_that_lost_its_ray_says_one_sentence_and_that_the_same_command_goes_on() -> None:
    lost = ActorDiedError(ActorDiedErrorContext(error_message="gone\nwith\nmany\nlines", actor_id=b"0" * 16))
    for error in (lost, ray.exceptions.LocalRayletDiedError(), ray.exceptions.GetTimeoutError("Get timed out: some object(s) not ready.")):
        said = sentence_of(error)
        assert said is not None
        assert "\n" not in said
        assert type(error).__name__ in said
        assert "the same command" in said
    assert sentence_of(StorageOutage("the storage did not answer")) == (
        "the storage did not answer; give the same command again: the run goes on from its newest checkpoint"
    )
    full = task_error(OSError(errno.ENOSPC, "No space left on device"))
    assert "free some space or raise the quota, then give the same command again" in (sentence_of(full) or "")
    assert sentence_of(ValueError("a bug or a setting")) is None
    assert sentence_of(task_error(KeyError("x"))) is None
