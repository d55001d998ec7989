"""Runs on images import nothing of what texts need, and so start no later for it."""

import subprocess
import sys

import pytest

from tests.e2e.running import PROJECT

OF_TEXTS = ("transformers", "tokenizers", "peft", "trainer.models.text")


@pytest.mark.parametrize("module", ["trainer.run", "trainer.rank.worker", "trainer.predict", "trainer.evaluate", "trainer.report.__main__"])
def test_no_process_of_a_run_on_images_imports_what_texts_need(module: str) -> None:
    code = f"import sys, {module}; print([name for name in {OF_TEXTS!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, timeout=200, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_ranks_of_a_run_on_images_are_forked_from_the_same_modules_as_before() -> None:
    from trainer.settings.spec import RANK_MODULES, rank_modules
    from trainer.settings.tree import RunConfig

    assert rank_modules(RunConfig()) == RANK_MODULES


def test_without_the_extra_a_model_of_texts_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    from dataio.schema import single_label
    from trainer.settings.packages import lacking
    from trainer.settings.texts import modules_of
    from trainer.settings.tree import ModelConfig, TaskConfig
    from trainer.tasks.make import make_task

    task, model = make_task(TaskConfig(), single_label(("a", "b")), holds_texts=True), ModelConfig(name="hf//no/folder")
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None)
    with pytest.raises(ValueError, match=r'hf//no/folder needs the packages transformers and tokenizers: pip install "transformers>=5"'):
        task.build(model, shape=(8,), seed=0)
    assert any("needs the packages transformers and tokenizers" in problem for problem in lacking(model))
    assert modules_of(model) == ()
