"""Runs on images import nothing of what texts need, and so start no later for it."""

import subprocess
import sys

import pytest

from tests.e2e.running import PROJECT

OF_TEXTS = ("transformers", "tokenizers", "trainer.models.text")


@pytest.mark.parametrize("module", ["trainer.run", "trainer.rank.worker", "trainer.predict", "trainer.evaluate", "trainer.report.__main__"])
def test_no_process_of_a_run_on_images_imports_what_texts_need(module: str) -> None:
    code = f"import sys, {module}; print([name for name in {OF_TEXTS!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, timeout=200, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_ranks_of_a_run_on_images_are_forked_from_the_same_modules_as_before() -> None:
    from trainer.settings.spec import RANK_MODULES, rank_modules
    from trainer.settings.tree import RunConfig

    assert rank_modules(RunConfig()) == RANK_MODULES
