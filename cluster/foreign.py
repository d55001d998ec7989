"""What the exceptions of other people's code mean: one table for torch, c10d, Ray, pyarrow, DALI, Python and the operating system.

Called by failures.classify for an exception whose class is not ours. The first row that fits decides; tests/cluster/test_foreign.py holds
an exception for each row, made by the thing itself where a machine without a GPU can. What no row knows is the user's: the same code on
the same data would fail again.

How rows are chosen:
  - A class, a number (errno) and words of the message decide, never the place in the traceback. A wrong shape shows deep inside torch, and
    a lost peer in the line of ours that reads a tensor: the innermost frame tells where a failure was noticed, not whose it is.
  - What would pass without anybody doing anything is "infrastructure". The retries have a budget, so a wrong guess costs three attempts.
  - What must be mended first is "storage" or "user", with the fix. A wrong guess here would end a run that could go on.
  - An OSError that no row knows is infrastructure: it comes from the world outside the process, and storage clients give no numbers.
"""

import errno
from collections.abc import Set
from dataclasses import dataclass

from cluster.names import Kind


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One kind of exception. `classes`, `errnos` and `texts` must all fit; an empty one always does."""

    name: str
    kind: Kind
    classes: frozenset[str]
    """The class or one of its bases: its name, after the top package's if it is not Python's own ("torch.OutOfMemoryError")."""
    errnos: frozenset[int] = frozenset()
    texts: tuple[str, ...] = ()
    """One of these is in the message, in lower case."""
    reason: str
    """Why it is of this kind."""
    fix: str = ""
    """What the user can do, if the message does not say it."""
    is_explained: bool = False
    """For the kind user: message and fix say it all. Otherwise the traceback is shown too."""
    is_echo: bool = False
    """It says that another process is gone, whose own failure is the cause."""

    def fits(self, classes: Set[str], number: int | None, text: str) -> bool:
        return (
            not self.classes.isdisjoint(classes)
            and (not self.errnos or number in self.errnos)
            and (not self.texts or any(words in text for words in self.texts))
        )


def row_of(classes: Set[str], number: int | None, message: str) -> Row | None:
    """The first row that fits an exception with these names of its class and bases, this errno and this message."""
    text = message.lower()
    return next((row for row in ROWS if row.fits(classes, number, text)), None)


def _of(package: str, *names: str) -> frozenset[str]:
    return frozenset(f"{package}.{name}" if package else name for name in names)


_RUNTIME = _of("", "RuntimeError")  # torch, gloo, NCCL and DALI raise it, or classes derived from it
_OS = _of("", "OSError")
_SMALLER = "lower --data.batch-size, or give --train.accumulate N (the same batch in less memory)"
_ROOM = "give each worker more memory: fewer workers, larger nodes, or a lower --data.batch-size"
_SUSPECT = "if it names the same node or GPU again, take that out"

_MEMORY = (
    Row(
        name="GPU memory",
        kind="user",
        classes=_of("torch", "OutOfMemoryError"),
        reason="a GPU belongs to one rank, and the same step asks for the same memory again",
        fix=_SMALLER,
        is_explained=True,
    ),
    Row(
        name="GPU memory, in a library",
        kind="user",
        classes=_RUNTIME,
        texts=(
            "cuda out of memory",
            "cuda error: out of memory",
            "cudaerrormemoryallocation",
            "cuda_error_out_of_memory",
            "cublas_status_alloc_failed",
            "cublas_status_not_initialized",
            "cudnn_status_alloc_failed",
            "cudnn_status_not_initialized",
        ),
        reason="as above; cuBLAS and cuDNN say 'not initialized' when nothing is left for their handles",
        fix=_SMALLER,
        is_explained=True,
    ),
    Row(
        name="memory of the node",
        kind="infrastructure",
        classes=_of("", "MemoryError"),
        reason="other processes share a node's memory; the kernel's SIGKILL for want of memory is infrastructure too",
        fix=_ROOM,
    ),
    Row(
        name="memory of the node, in torch",
        kind="infrastructure",
        classes=_RUNTIME,
        texts=("defaultcpuallocator: can't allocate memory", "cannot allocate memory"),
        reason="as above",
        fix=_ROOM,
    ),
    Row(
        name="memory of the node, in the kernel",
        kind="infrastructure",
        classes=_OS,
        errnos=frozenset({errno.ENOMEM}),
        reason="as above",
        fix=_ROOM,
    ),
)

_GPU = (
    Row(
        name="an index out of range on the GPU",
        kind="user",
        classes=_RUNTIME,
        texts=("device-side assert",),
        reason="the same labels and the same code assert again",
        fix="most often a label or an index is out of range; CUDA_LAUNCH_BLOCKING=1 gives the line",
    ),
    Row(
        name="GPU without a fitting driver or build",
        kind="user",
        classes=_RUNTIME,
        texts=(
            "no kernel image is available",
            "invalid device function",
            "driver version is insufficient",
            "forward compatibility was attempted",
            "found no nvidia driver",
            "not compiled with cuda enabled",
            "invalid device ordinal",
            "while cuda is not available",
            "cudnn_status_arch_mismatch",
            "cublas_status_arch_mismatch",
        ),
        reason="what is installed does not change by itself",
        fix="install a torch build and a driver that fit the GPUs of every node, or give --cluster.gpus-per-worker 0",
        is_explained=True,
    ),
    Row(
        name="GPU that failed",
        kind="infrastructure",
        classes=_RUNTIME,
        texts=(
            "uncorrectable ecc",
            "uncorrectable nvlink",
            "nvlink error",
            "hardware stack error",
            "unspecified launch failure",
            "illegal memory access",
            "illegal instruction",
            "launch timed out",
            "gpu is lost",
            "fallen off the bus",
            "busy or unavailable",
            "no cuda-capable device",
            "no cuda gpus are available",
            "system not yet initialized",
            "cuda error: unknown error",
            "mps client",
            "ncclunhandledcudaerror",
            "cudnn_status_execution_failed",
            "cudnn_status_internal_error",
            "cudnn_status_mapping_error",
            "cublas_status_execution_failed",
            "cublas_status_internal_error",
            "cublas_status_mapping_error",
        ),
        reason="the device, its memory, its link or its driver gave out; a fresh process, maybe elsewhere, often goes on",
        fix=_SUSPECT,
    ),
    Row(
        name="GPU, any other error",
        kind="user",
        classes=_RUNTIME,
        texts=("cuda error:", "cudaerror", "cuda_error_", "cudnn_status_", "cublas_status_", "cudnn error", "nvjpeg error"),
        reason="the rest of CUDA's errors are wrong arguments and unsupported calls, which come again",
        fix="CUDA_LAUNCH_BLOCKING=1 gives the line",
    ),
)

_GROUP = (
    Row(
        name="a network interface that is not there",
        kind="user",
        classes=_RUNTIME,
        texts=("unable to find address for", "no socket interface found"),
        reason="the variable names it again",
        fix="unset GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME, or name an interface that every node has",
        is_explained=True,
    ),
    Row(
        name="ranks that call different collectives",
        kind="user",
        classes=_RUNTIME,
        texts=("detected mismatch between collectives", "op.preamble.length", "ncclinvalidusage", "ncclinvalidargument"),
        reason="the same code makes the same calls again",
    ),
    Row(
        name="a lost rank, in words",
        kind="infrastructure",
        classes=_RUNTIME,
        texts=(
            "connection closed by peer",
            "connection reset by peer",
            "connection refused",
            "connection timed out",
            "no route to host",
            "broken pipe",
            "read timeout",
            "socket timeout",
            "timed out waiting",
            "wait timeout",
            "application timeout caused pair closure",
            "gloo/transport/tcp/",
            "connectfullmesh failed",
            "failed to recv, got 0 bytes",
            "the client socket has",
            "the server socket has failed",
            "in monitoredbarrier",
            "nccl communicator was aborted",
            "ncclremoteerror",
            "ncclsystemerror",
            "ncclinternalerror",
            "watchdog caught collective operation timeout",
            "watchdog got stuck",
        ),
        reason="the peer is gone, cut off or too slow; its own failure says why",
        is_echo=True,
    ),
    Row(
        name="a lost rank, by c10d's class",
        kind="infrastructure",
        classes=_of("torch", "DistBackendError", "DistNetworkError", "DistStoreError"),
        reason="c10d raises these for its network, its store and NCCL; wrong calls have a row above",
        is_echo=True,
    ),
)

_HELPERS = (
    Row(
        name="a helper process that died",
        kind="infrastructure",
        classes=_RUNTIME,
        texts=("dataloader worker (pid", "terminated abruptly"),
        reason="it was killed, mostly for want of memory, as a rank may be",
        fix=_ROOM,
    ),
    Row(
        name="a thread that cannot start",
        kind="user",
        classes=_RUNTIME,
        texts=("can't start new thread", "thread creation failed", "resource temporarily unavailable"),
        reason="the limit on processes and threads is set by somebody, and is met again",
        fix="raise the limit on processes and threads (`ulimit -u`, a container's pids limit), or lower --cluster.threads-per-worker",
        is_explained=True,
    ),
    Row(
        name="torch.compile",
        kind="user",
        classes=_of("torch", "TorchDynamoException", "InductorError", "BackendCompilerFailed"),
        reason="the same code compiles to the same error",
        fix="give --train.compile false, and report it",
    ),
    Row(
        name="DALI",
        kind="user",
        classes=_RUNTIME,
        texts=("critical error in pipeline", "nvidia.dali", "nvimagecodec failure", "[/opt/dali/"),
        reason="the same bytes in the same pipeline fail again; what its GPU gave out of has a row above",
        fix="give --data.backend torch",
    ),
    Row(
        name="an interrupt from outside",
        kind="infrastructure",
        classes=_of("", "KeyboardInterrupt"),
        reason="somebody sent SIGINT to a rank; Ctrl-C of the user goes to the driver",
    ),
)

_RAY = (
    Row(
        name="Ray takes a node away",
        kind="preempted",
        classes=_of("ray", "PreemptionError"),
        reason="the node is reclaimed, which is nobody's failure",
    ),
    Row(
        name="Ray finds a collective that hangs",
        kind="hang",
        classes=_of("ray", "NCCLHangError"),
        reason="all ranks wait for one another",
    ),
    Row(
        name="Ray's disk is full",
        kind="storage",
        classes=_of("ray", "OutOfDiskError"),
        reason="nothing frees it by itself",
        fix="free some space where Ray keeps its files (its temp folder) on that node",
    ),
    Row(
        name="Ray's object store is full",
        kind="user",
        classes=_of("ray", "ObjectStoreFullError"),
        reason="the same data set is sent through it again",
        fix="put the data where all nodes can read them, or give Ray a larger object store",
        is_explained=True,
    ),
    Row(
        name="Ray asks for a token",
        kind="user",
        classes=_of("ray", "AuthenticationError"),
        reason="the same token is refused again",
        fix="give every process the cluster's token (RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH)",
        is_explained=True,
    ),
    Row(
        name="an exception inside a task of Ray's, whose class cannot be told",
        kind="user",
        classes=_of(
            "ray", "RayTaskError", "UserCodeException", "CrossLanguageError", "UnserializableException", "UserExceptionWithTraceback"
        ),
        reason="code raised it; a cause that can be told is taken out first (failures.unwrapped)",
    ),
    Row(
        name="a use of Ray that is wrong",
        kind="user",
        classes=_of(
            "ray",
            "ActorAlreadyExistsError",
            "ObjectRefStreamEndOfStreamError",
            "OufOfBandObjectRefSerializationException",
            "PendingCallsLimitExceeded",
            "StreamingGeneratorReplayInconsistentError",
        ),
        reason="a fault of this program, which it makes again",
    ),
    Row(
        name="a process or node of Ray's is lost",
        kind="infrastructure",
        classes=_of(
            "ray",
            *("RayActorError", "ActorDiedError", "ActorUnavailableError", "ActorHandleNotFoundError", "AsyncioActorExit"),
            *("WorkerCrashedError", "NodeDiedError", "LocalRayletDiedError", "OutOfMemoryError", "TaskCancelledError"),
            *("WorkerHealthCheckTimeoutError", "WorkerHealthCheckFailedError"),
            *("WorkerGroupStartupFailedError", "WorkerGroupStartupTimeoutError", "SynchronizationBarrierResetError"),
        ),
        reason="it was killed, its node went, or the node ran out of memory (Ray's OutOfMemoryError is not a GPU's)",
    ),
    Row(
        name="an object of Ray's is lost",
        kind="infrastructure",
        classes=_of(
            "ray",
            *("ObjectLostError", "ObjectFetchTimedOutError", "ObjectFreedError", "ObjectReconstructionFailedError", "OwnerDiedError"),
            *("ReferenceCountingAssertionError", "PlasmaObjectNotAvailable"),
        ),
        reason="the process that held it went; a new fleet sends it again",
    ),
    Row(
        name="Ray has no room",
        kind="infrastructure",
        classes=_of(
            "ray",
            *("ActorUnschedulableError", "TaskUnschedulableError", "ActorPlacementGroupRemoved", "TaskPlacementGroupRemoved"),
            *("InsufficientClusterResourcesError", "RuntimeEnvSetupError"),
        ),
        reason="nodes come and go, and a node that has just come may not be ready",
    ),
    Row(
        name="Ray does not answer",
        kind="infrastructure",
        classes=_of(
            "ray",
            *("GetTimeoutError", "RpcError", "RaySystemError", "RayChannelError", "RayChannelTimeoutError"),
            *("RayCgraphCapacityExceeded", "RayDirectTransportError"),
            *("CollectiveTimeoutError", "BroadcastCollectiveTimeoutError", "RASQueryError"),
        ),
        reason="its control plane or network is away or slow",
    ),
    Row(
        name="Ray, any other error",
        kind="infrastructure",
        classes=_of(
            "ray",
            *("RayError", "RayTrainError", "TrainingFailedError", "WorkerGroupError", "ControllerError"),
            "CheckpointManagerInitializationError",
        ),
        reason="what Ray raises for itself is about its processes; code's own exceptions have a row above",
    ),
)

_ARROW = (
    Row(
        name="pyarrow was interrupted",
        kind="infrastructure",
        classes=_of("pyarrow", "ArrowCancelled"),
        reason="a signal from outside",
    ),
    Row(
        name="pyarrow",
        kind="user",
        classes=_of("pyarrow", "ArrowException"),
        reason="the same bytes and the same call fail again; for files it raises OSErrors, for want of memory a MemoryError",
    ),
)

_MISTAKES = (
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY, errno.EXDEV, errno.ELOOP, errno.ENAMETOOLONG),
    *(errno.EINVAL, errno.EBADF, errno.EFBIG, errno.ESPIPE, errno.ENOEXEC, errno.ENOSYS, errno.EOPNOTSUPP, errno.EDOM, errno.ERANGE),
    *(errno.EFAULT, errno.ENOTTY, errno.ECHILD, errno.E2BIG, errno.EPROTONOSUPPORT, errno.EAFNOSUPPORT),
)
_SYSTEM = (
    Row(
        name="a certificate that is not trusted",
        kind="user",
        classes=_of("ssl", "SSLCertVerificationError"),
        reason="the same certificate is refused again",
        fix="give every node the certificate of who signed it (SSL_CERT_FILE), and the right time",
        is_explained=True,
    ),
    Row(
        name="an encrypted connection or a name's address",
        kind="infrastructure",
        classes=frozenset({"ssl.SSLError", "socket.gaierror", "socket.herror"}),
        reason="the network failed; their numbers are not the system's, so this stands before the rows with numbers",
    ),
    Row(
        name="a disk is full",
        kind="storage",
        classes=_OS,
        errnos=frozenset({errno.ENOSPC, errno.EDQUOT}),
        reason="nothing frees it by itself",
        fix="free some space or raise the quota",
    ),
    Row(
        name="a disk or a file refuses",
        kind="storage",
        classes=_OS,
        errnos=frozenset({errno.EACCES, errno.EPERM, errno.EROFS}),
        reason="rights and mounts are given by somebody",
        fix="give this user the rights, or mount it for writing",
    ),
    Row(
        name="a file may not be used, without a number",
        kind="storage",
        classes=_of("", "PermissionError"),
        reason="as above",
    ),
    Row(
        name="too many open files",
        kind="user",
        classes=_OS,
        errnos=frozenset({errno.EMFILE, errno.ENFILE}),
        reason="the limit is set by somebody, and is met again",
        fix="raise the limit on open files of every node (`ulimit -n 65536`)",
        is_explained=True,
    ),
    Row(
        name="a call on the operating system that is wrong",
        kind="user",
        classes=_OS,
        errnos=frozenset(_MISTAKES),
        reason="the same file is missing, and the same argument wrong, again",
    ),
    Row(
        name="a file that is not there or not of the kind, without a number",
        kind="user",
        classes=frozenset({"FileNotFoundError", "FileExistsError", "IsADirectoryError", "NotADirectoryError", "io.UnsupportedOperation"}),
        reason="as above",
    ),
    Row(
        name="a disk, a mount or a network that failed",
        kind="infrastructure",
        classes=_OS,
        reason="it may answer later: EIO and ESTALE of a network file system, time-outs and resets of a connection, object stores and "
        "names that cannot be resolved, which have no number",
    ),
)

ROWS: tuple[Row, ...] = (*_RAY, *_MEMORY, *_GPU, *_GROUP, *_HELPERS, *_ARROW, *_SYSTEM)
"""Ray's come first: GetTimeoutError is an OSError too."""
