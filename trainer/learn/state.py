"""The training state as files: model, optimiser and moving average, bit for bit. `trainer.rank.saving` takes and restores it;
cluster.checkpointer and cluster.store bring the files into the storage.

A snapshot is a copy into private buffers on the step path. Another thread writes it out while steps go on. The buffers are laid out as
safetensors files from the start, so nothing is serialised again, and nothing is ever pickled. The step path copies tensors in their own
memory order (channels_last); the writing thread brings them into the file's order.
"""

import hashlib
import json
import struct
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from trainer.learn.ema import Ema

MODEL_FILE, OPTIMIZER_FILE, EMA_FILE = "model.safetensors", "optimizer.safetensors", "ema.safetensors"
SEMI_FILE = "semi.safetensors"

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}

_PIECE_BYTES = 1 << 20
_COPY_THREADS = 4  # more threads get no more memory bandwidth
_INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}

# State that each optimiser keeps for a parameter, from its first step on.
_SLOTS: dict[type[torch.optim.Optimizer], Callable[[dict[str, Any]], tuple[str, ...]]] = {
    torch.optim.SGD: lambda group: ("momentum_buffer",) if group["momentum"] else (),
    torch.optim.AdamW: lambda group: ("exp_avg", "exp_avg_sq", "step"),
}


class StateError(ValueError):
    """A checkpoint does not fit this run. The message names what differs."""

    failure_kind = "user"


class Snapshot:
    """The state at one moment, in its own buffers until `release()`. Another thread may wait for it and read it."""

    def __init__(self, images: Mapping[str, "_FileImage"], give_back: Callable[[], None]) -> None:
        self._images, self._give_back = images, give_back
        self._released = False

    def wait(self) -> None:
        """Wait until the copies from the device have arrived."""
        for image in self._images.values():
            image.wait()

    def files(self) -> dict[str, tuple[memoryview, ...]]:
        """Each file's contents, as buffers to write one after the other. They are valid until `release()`. Waits for the device."""
        assert not self._released, "the buffers may hold a later snapshot already"
        self.wait()
        return {name: (image.contents(),) for name, image in self._images.items()}

    def release(self) -> None:
        """Give the buffers to the next snapshot."""
        assert not self._released
        self._released = True
        self._give_back()


class TrainState:
    """The state that a run needs to go on with the same bits. Build it after model, optimiser and average are on their device."""

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, ema: Ema | None = None, semi: Mapping[str, Tensor] | None = None
    ) -> None:
        """`semi`: the averages by which a run with unlabelled images judges its guesses (trainer.learn.semi), by reference."""
        assert isinstance(optimizer, tuple(_SLOTS)), f"state of {type(optimizer).__name__} is not known here"
        self._model, self._optimizer, self._ema, self._semi = model, optimizer, ema, semi
        # The optimisers of trainer.learn.cpu_optim keep the state of the PyTorch optimiser that they replace.
        self._optimizer_type = next(known for known in _SLOTS if isinstance(optimizer, known))
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._parameters = {names[id(p)]: (p, group) for group in optimizer.param_groups for p in group["params"]}
        self._free: list[dict[str, _FileImage]] = []

    def snapshot(self, scalars: Mapping[str, Any] | None = None) -> Snapshot:
        """Copy the state. `scalars` (JSON) are saved in model.safetensors' metadata, and `load` returns them.

        On a CPU the copy is complete on return. On a GPU the copy on the device is queued behind the step, and the transfer to the host
        runs during the next steps. Released snapshots' buffers are reused. Two sets are enough if each snapshot is released before the next
        but one is taken.
        """
        contents = self._contents(scalars or {})
        images = self._free.pop() if self._free else {}
        for name, (tensors, metadata) in contents.items():
            image = images.get(name)
            if image is None or not image.fits(tensors, metadata):
                image = images[name] = _FileImage(tensors, metadata)
            image.fill(tensors, metadata)
        return Snapshot(images, lambda: self._free.append(images))

    def load(self, read: Callable[[str], bytes | bytearray | memoryview]) -> dict[str, Any]:
        """Load a snapshot's files and return its scalars. If one file does not fit, StateError, and nothing is loaded. `read(name)` returns
        a file's verified contents."""
        model_tensors, model_metadata = _parse(read(MODEL_FILE), MODEL_FILE)
        saved_files = json.loads(model_metadata.get("files", "[]"))
        if (EMA_FILE in saved_files) != (self._ema is not None):
            has, sets = ("an", "sets none") if EMA_FILE in saved_files else ("no", "sets one")
            raise StateError(
                f"the checkpoint has {has} average of the weights and train.ema {sets}; resume with the train.ema it was made with"
            )
        if (SEMI_FILE in saved_files) != (self._semi is not None):
            was, now = ("with", "without") if SEMI_FILE in saved_files else ("without", "with")
            raise StateError(
                f"the checkpoint was made {was} unlabelled images, and this run goes on {now} them; give the same data.unlabelled"
            )
        copies = _match(model_tensors, _model_tensors(self._model), MODEL_FILE)
        if self._semi is not None:
            copies += _match(_parse(read(SEMI_FILE), SEMI_FILE)[0], self._semi, SEMI_FILE)
        if self._ema is not None:
            copies += _match(_parse(read(EMA_FILE), EMA_FILE)[0], self._ema.state(), EMA_FILE)
        slots = self._parse_optimizer(*_parse(read(OPTIMIZER_FILE), OPTIMIZER_FILE))
        with torch.no_grad():
            for into, tensor in copies:
                into.copy_(tensor)
        self._optimizer.state.clear()
        for name, values in slots.items():
            parameter, group = self._parameters[name]
            state = self._optimizer.state[parameter]
            for slot, value in values.items():
                if slot == "step":
                    on_device = group.get("fused") or group.get("capturable")
                    state[slot] = value.to(parameter.device) if on_device else value.clone()
                else:
                    like_parameter = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False)  # with its strides
                    state[slot] = like_parameter.copy_(value)
        scalars: dict[str, Any] = json.loads(model_metadata.get("scalars", "{}"))
        return scalars

    def _contents(self, scalars: Mapping[str, Any]) -> dict[str, tuple[dict[str, Tensor], dict[str, str]]]:
        """For each file, its tensors and its metadata."""
        optimizer_tensors, idle = {}, []
        for name, (parameter, group) in self._parameters.items():
            state = self._optimizer.state.get(parameter, {})
            present = [slot for slot in _SLOTS[self._optimizer_type](group) if state.get(slot) is not None]
            if not present:
                idle.append(name)
            optimizer_tensors.update({f"{name}/{slot}": state[slot].detach() for slot in present})
        about = {"optimizer": self._kind(), "idle": json.dumps(idle)}
        files = {MODEL_FILE: (_model_tensors(self._model), {}), OPTIMIZER_FILE: (optimizer_tensors, about)}
        if self._ema is not None:
            files[EMA_FILE] = (self._ema.state(), {})
        if self._semi is not None:
            files[SEMI_FILE] = (dict(self._semi), {})
        files[MODEL_FILE][1].update(files=json.dumps(list(files)), scalars=json.dumps(dict(scalars), sort_keys=True))
        return files

    def _kind(self) -> str:
        slots = _SLOTS[self._optimizer_type](self._optimizer.param_groups[0])
        return f"{self._optimizer_type.__name__} ({', '.join(slots) or 'no memory'})"

    def _parse_optimizer(self, tensors: dict[str, Tensor], metadata: Mapping[str, str]) -> dict[str, dict[str, Tensor]]:
        """For each parameter name, its slots, checked against the optimiser. Parameters that were never stepped are absent."""
        ours = self._kind()
        if metadata.get("optimizer") != ours:
            raise StateError(
                f"the checkpoint was made with the optimiser {metadata.get('optimizer')}, not {ours}; "
                "resume with the optim.name and momentum it was made with, or start a new run (--run NEW_NAME)"
            )
        idle = set(json.loads(metadata.get("idle", "[]")))
        expected = {
            f"{name}/{slot}": torch.empty((), device="meta") if slot == "step" else parameter
            for name, (parameter, group) in self._parameters.items()
            for slot in _SLOTS[self._optimizer_type](group)
            if name not in idle
        }
        _match(tensors, expected, OPTIMIZER_FILE)
        slots: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            name, _, slot = key.rpartition("/")
            slots.setdefault(name, {})[slot] = tensor
        return slots


def weights_sha256(model: nn.Module | Mapping[str, Tensor]) -> str:
    """Hash of a model's (or a state_dict's) tensors: sorted names, types, shapes and bytes. Independent of device and memory format."""
    digest = hashlib.sha256()
    tensors = model.state_dict() if isinstance(model, nn.Module) else model
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}\0{_DTYPES[tensor.dtype]}\0{tuple(tensor.shape)}\0".encode())
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(raw.numpy().data)
    return digest.hexdigest()


def read_metadata(data: bytes | bytearray | memoryview) -> dict[str, str]:
    """The `__metadata__` of a safetensors file in memory."""
    (length,) = struct.unpack_from("<Q", data)
    metadata: dict[str, str] = json.loads(bytes(data[8 : 8 + length])).get("__metadata__", {})
    return metadata


# -- a file in memory -----------------------------------------------------------------------------------------------------------------


class _FileImage:
    """A safetensors file in memory. Its tensors are views into the file, so filling the file means copying tensors.

    Format (github.com/huggingface/safetensors): the header's length in 8 bytes, little endian; the header as JSON, padded with spaces; then
    the tensors without gaps. Here they are sorted by falling item size, so that each is aligned to its own item size.
    """

    def __init__(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        self._layout = _layout(tensors)
        order = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
        self._spans: dict[str, tuple[int, int]] = {}
        size = 0
        for name in order:
            self._spans[name] = (size, size + tensors[name].nbytes)
            size += tensors[name].nbytes
        # Leave room for scalars that grow with the run, such as the digits of a step number.
        self._header_room = (len(self._header(metadata)) + 256 + 63) // 64 * 64 - 8
        gpu = next((tensor.device for tensor in tensors.values() if _is_on_gpu(tensor)), None)
        is_pinned = gpu is not None and gpu.type == "cuda"
        self._file = torch.empty(8 + self._header_room + size, dtype=torch.uint8, pin_memory=is_pinned)  # (bytes,)
        body = self._file[8 + self._header_room :]
        self._host = {name: _view(body, self._spans[name], tensors[name]) for name in order}
        # Tensors copied in their own memory order: name -> (span as bytes, view of it in that order; None if that is the file's order).
        self._as_they_lie: dict[str, tuple[np.ndarray[Any, Any], Tensor | None]] = {}
        self._is_in_file_order = True
        self._device: _DeviceCopy | None = None
        if gpu is not None:
            self._device = _DeviceCopy(body, {name: (self._spans[name], tensors[name]) for name in order}, gpu)
        for name in order:
            tensor, (begin, end) = tensors[name], self._spans[name]
            if _is_dense(tensor) and (gpu is None or _is_on_gpu(tensor)):
                own = None if tensor.is_contiguous() else self._host[name].as_strided(tensor.shape, tensor.stride())
                self._as_they_lie[name] = body[begin:end].numpy(), own

    def fits(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bool:
        return self._layout == _layout(tensors) and len(self._header(metadata)) <= self._header_room

    @torch.no_grad()
    def fill(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        header = self._header(metadata).ljust(self._header_room)
        self._file[: 8 + len(header)].copy_(torch.frombuffer(bytearray(struct.pack("<Q", len(header)) + header), dtype=torch.uint8))
        self._is_in_file_order = False
        if self._device is not None:
            self._device.start(tensors, self._host)
            return
        for name in self._host.keys() - self._as_they_lie.keys():
            self._host[name].copy_(tensors[name])
        _copy_bytes([(into, _bytes_as_they_lie(tensors[name])) for name, (into, _) in self._as_they_lie.items()], torch.get_num_threads())

    def wait(self) -> None:
        if self._device is not None:
            self._device.finish()

    def contents(self) -> memoryview:
        if not self._is_in_file_order:
            for name, (_, own) in self._as_they_lie.items():
                if own is not None:
                    integers = _INTEGERS[own.itemsize]  # numpy knows no bfloat16
                    self._host[name].view(integers).numpy()[...] = np.ascontiguousarray(own.view(integers).numpy())
            self._is_in_file_order = True
        return self._file.numpy().data

    def _header(self, metadata: Mapping[str, str]) -> bytes:
        entries: dict[str, Any] = {"__metadata__": dict(metadata)}
        for name, (dtype, shape, _) in self._layout.items():
            entries[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": list(self._spans[name])}
        return json.dumps(entries, separators=(",", ":")).encode()


class _DeviceCopy:
    """Copies from a GPU to the host in two hops. The first copies all tensors into one buffer on the device, in stream order with the
    steps. The second transfers this buffer to pinned host memory on its own stream, during the next steps.

    The first hop is in the way of the steps. It copies tensors as they lie in memory, and each type by itself: only then does PyTorch copy
    many tensors with one kernel, instead of each with its own (some 180 for ResNet-18)."""

    def __init__(self, body: Tensor, spans: Mapping[str, tuple[tuple[int, int], Tensor]], device: torch.device) -> None:
        self._body = body
        self._staging = torch.empty(body.numel(), dtype=torch.uint8, device=device)  # (bytes,)
        self._staged: dict[str, Tensor] = {}
        groups: dict[torch.dtype | None, list[str]] = {}  # by type; under None what has gaps, and is staged in the file's order
        for name, (span, tensor) in spans.items():
            if _is_on_gpu(tensor):
                view, is_dense = _view(self._staging, span, tensor), _is_dense(tensor)
                self._staged[name] = view.as_strided(tensor.shape, tensor.stride()) if is_dense else view
                groups.setdefault(tensor.dtype if is_dense else None, []).append(name)
        self._groups = list(groups.values())
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._late: list[tuple[Tensor, Tensor]] = []

    def start(self, tensors: Mapping[str, Tensor], host: Mapping[str, Tensor]) -> None:
        steps = torch.cuda.current_stream(self._staging.device)
        steps.wait_stream(self._stream)  # for the previous snapshot's transfer, which ended long ago
        for names in self._groups:
            torch._foreach_copy_([self._staged[name] for name in names], [tensors[name] for name in names])
        self._stream.wait_stream(steps)
        with torch.cuda.stream(self._stream):
            self._body.copy_(self._staging, non_blocking=True)
            self._done.record()
        # The transfer overwrites the whole body, so the few tensors on the host (step counters) are copied after it.
        self._late = [(host[name], tensors[name].clone()) for name in host if name not in self._staged]

    def finish(self) -> None:
        self._done.synchronize()
        for into, tensor in self._late:
            into.copy_(tensor)
        self._late = []


def _copy_bytes(pairs: Sequence[tuple["np.ndarray[Any, Any]", "np.ndarray[Any, Any]"]], threads: int) -> None:
    """Copy each pair's second array into the first, both (n,) uint8, with up to `threads` threads.

    Free threads take the next piece, so a thread that gets no core delays nobody. torch instead cuts each tensor evenly and waits for all
    threads. On two cores with other work, copying 89.5 MB took torch 90 ms (158 ms if it also reordered channels_last), and this 20 ms."""
    pieces = deque(
        (into[start : start + _PIECE_BYTES], source[start : start + _PIECE_BYTES])
        for into, source in pairs
        for start in range(0, into.size, _PIECE_BYTES)
    )
    if not pieces:
        return
    left, lock, done = len(pieces), threading.Lock(), threading.Event()

    def work() -> None:
        nonlocal left
        while True:
            try:
                into, source = pieces.popleft()
            except IndexError:
                return
            np.copyto(into, source)
            with lock:
                left -= 1
                if left == 0:
                    done.set()

    for number in range(min(threads, _COPY_THREADS) - 1):
        threading.Thread(target=work, name=f"snapshot-{number}", daemon=True).start()
    work()
    done.wait()


def _layout(tensors: Mapping[str, Tensor]) -> dict[str, tuple[torch.dtype, torch.Size, tuple[int, ...]]]:
    """Each tensor's type, shape and strides."""
    return {name: (tensor.dtype, tensor.shape, tensor.stride()) for name, tensor in tensors.items()}


def _is_on_gpu(tensor: Tensor) -> bool:
    return tensor.is_cuda


def _is_dense(tensor: Tensor) -> bool:
    """Whether its elements lie without gaps, in any order."""
    return torch.empty_like(tensor, device="meta", memory_format=torch.preserve_format).stride() == tensor.stride()


def _bytes_as_they_lie(tensor: Tensor) -> "np.ndarray[Any, Any]":
    flat: np.ndarray[Any, Any] = tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8).numpy()
    return flat


def _view(body: Tensor, span: tuple[int, int], like: Tensor) -> Tensor:
    return body[span[0] : span[1]].view(like.dtype).view(like.shape)


def _model_tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


# -- reading --------------------------------------------------------------------------------------------------------------------------


def _parse(data: bytes | bytearray | memoryview, name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        return dict(safetensors.torch.load(bytes(data))), read_metadata(data)
    except (safetensors.SafetensorError, struct.error, ValueError) as error:
        raise StateError(f"{name} is not a safetensors file ({error}); resume from an older checkpoint") from error


def _match(saved: Mapping[str, Tensor], expected: Mapping[str, Tensor], name: str) -> list[tuple[Tensor, Tensor]]:
    """(ours, saved) pairs of tensors. StateError if names, shapes or types differ."""
    problems = [f"{key} is missing" for key in expected if key not in saved]
    problems += [f"{key} is not ours" for key in saved if key not in expected]
    for key in expected.keys() & saved.keys():
        ours, theirs = expected[key], saved[key]
        if (ours.shape, ours.dtype) != (theirs.shape, theirs.dtype):
            problems.append(f"{key} is {theirs.dtype} {tuple(theirs.shape)} there and {ours.dtype} {tuple(ours.shape)} here")
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise StateError(
            f"the checkpoint's {name} does not fit: {'; '.join(sorted(problems)[:5])}{more}. Resume with the model, classes and "
            "optimiser it was made with, or start a new run (--run NEW_NAME)"
        )
    return [(expected[key], saved[key]) for key in expected]
