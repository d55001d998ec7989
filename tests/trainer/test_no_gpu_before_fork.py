"""No process that forks ranks may have initialised CUDA, as no context of it survives a fork. Seen without a GPU, by a driver library that
answers that there is none and notes who asked."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from cluster.zygote import Zygote
from trainer.settings.spec import RANK_MODULES

DRIVER = r"""
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define NO_DEVICE 100

int cuInit(unsigned flags) {
    FILE *asked = fopen(getenv("ASKED_OF_CUDA"), "a");
    fprintf(asked, "%d\n", getpid());
    fclose(asked);
    return NO_DEVICE;
}

int cuDriverGetVersion(int *version) { *version = 99000; return 0; }

static int no_device(void) { return NO_DEVICE; }

int cuGetProcAddress_v2(const char *name, void **found, int version, unsigned long long flags, void *status) {
    if (!strcmp(name, "cuInit")) *found = (void *)cuInit;
    else if (!strcmp(name, "cuDriverGetVersion")) *found = (void *)cuDriverGetVersion;
    else if (!strncmp(name, "cuGetProcAddress", 16)) *found = (void *)cuGetProcAddress_v2;
    else *found = (void *)no_device;
    return 0;
}

int cuGetProcAddress(const char *name, void **found, int version, unsigned long long flags) {
    return cuGetProcAddress_v2(name, found, version, flags, 0);
}
"""

pytestmark = [
    pytest.mark.skipif(torch.version.cuda is None, reason="needs a PyTorch that is built for CUDA"),
    pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler (cc)"),
]


def test_only_what_is_forked_asks_for_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, asked = tmp_path / "driver.c", tmp_path / "asked"
    source.write_text(DRIVER)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", tmp_path / "libcuda.so.1", source], check=True, timeout=60)
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    monkeypatch.setenv("ASKED_OF_CUDA", str(asked))
    zygote = Zygote(RANK_MODULES)
    try:
        reading, writing = os.pipe()
        assert zygote.fork("tests.cluster.ranks:say_hello", [writing]).wait(60) == 0  # by now everything is imported
        assert os.read(reading, 100)
        assert not asked.exists()
        assert zygote.fork("tests.cluster.ranks:ask_for_gpus", [writing]).wait(60) == 0
        assert set(asked.read_text().split()) == {os.read(reading, 100).decode()}
    finally:
        zygote.close()
