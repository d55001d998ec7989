"""The Triton kernel makes the integer reference's bytes, and compiles for a GPU; neither needs one. tests/gpu runs it on one."""

import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dataio.codecs.image.augment import draw, reference
from dataio.codecs.image.backends import _kernel, make_backend

pytest.importorskip("triton", reason="torch's build for CPUs brings no Triton")
PROJECT = Path(__file__).parents[2]
GPU = torch.device("cuda", 0)


def test_in_tritons_interpreter_the_kernel_makes_the_integer_references_bytes() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.dataio.kernel_in_interpreter"],
        cwd=PROJECT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.search(r"(\d+) batches are equal", done.stdout)
    assert found is not None, done.stdout
    assert int(found[1]) > 10


def test_the_kernel_compiles_to_machine_code_of_a_gpu_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from dataio.codecs.image.kernel import BLOCK, _crop_and_flip

    source = ASTSource(
        _crop_and_flip,
        signature={"images": "*u8", "where": "*i64", "out": "*u8", **dict.fromkeys(("height", "width", "pad", "block"), "constexpr")},
        constexprs={"height": 32, "width": 32, "pad": 4, "block": BLOCK},
    )
    made = compile(source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": False})
    assert made.asm["cubin"].startswith(b"\x7fELF")
    assert re.search(r"^\.target sm_90", made.asm["ptx"], re.MULTILINE)
    assert made.metadata.shared == 0  # nothing is exchanged between threads


def test_on_a_cpu_torchs_operations_make_the_batch_and_triton_is_not_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dataio.codecs.image.kernel", None)  # an import fails
    images, rows = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3), np.array([1, 0, 1])
    drawn = draw(seed=0, epoch=0, ids=rows, pad=1, flip=True)
    made = make_backend("torch", height=4, width=4, pad=1, batch_size=3, device=torch.device("cpu"))
    assert np.array_equal(made.batch(images, rows, drawn).numpy(), reference(images[rows], drawn, 1))


def test_a_gpu_without_triton_or_without_a_compiler_has_torchs_operations_and_says_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    zeros = torch.zeros

    def no_compiler(*_: object) -> torch.Tensor:
        raise RuntimeError("Failed to find C compiler.")

    monkeypatch.setattr("torch.zeros", lambda shape, *, dtype, device=None: zeros(shape, dtype=dtype))  # no GPU
    monkeypatch.setattr("torch.Tensor.to", lambda tensor, device: tensor)
    monkeypatch.setitem(sys.modules, "dataio.codecs.image.kernel", SimpleNamespace(crop_and_flip=no_compiler))
    with caplog.at_level(logging.WARNING):
        assert _kernel(4, 4, 1, GPU) is None
    assert "Failed to find C compiler." in caplog.text
    assert "TRITON_CACHE_DIR" in caplog.text
    caplog.clear()

    tried: list[tuple[tuple[int, ...], int]] = []
    monkeypatch.setitem(
        sys.modules,
        "dataio.codecs.image.kernel",
        SimpleNamespace(crop_and_flip=lambda images, where, pad: tried.append((tuple(images.shape), pad))),
    )
    assert _kernel(4, 5, 1, GPU) is not None
    assert tried == [((1, 4, 5, 3), 1)]  # compiled for the size that batches have
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert _kernel(4, 4, 1, GPU) is None
    assert not caplog.records
