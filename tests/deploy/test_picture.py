"""The picture in docs/design.md shows the packages as they import each other, and as few arrows as say so."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.picture import BEGIN, END, PAGE, PROJECT, arrows_of, boxes_of, main, picture, reachable, reduced
from tests.deploy.rules import PROJECT as CHECKOUT

NAMES = "abcdef"
ARROWS = st.sets(st.tuples(st.sampled_from(NAMES), st.sampled_from(NAMES)).filter(lambda arrow: arrow[0] != arrow[1]))
DOWNWARDS = ARROWS.map(lambda arrows: {(min(arrow), max(arrow)) for arrow in arrows})


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A small one with every way to import."""
    for name, text in {
        "trainer/__init__.py": "",
        "trainer/run.py": "from trainer import drive\nimport json\n",
        "trainer/predict.py": "import trainer.settings.tree as tree\n",
        "trainer/drive/__init__.py": "",
        "trainer/drive/plan.py": "def plan():\n    from trainer.settings.tree import RunConfig\n    import torch\n",
        "trainer/drive/inner/__init__.py": "from ...settings import tree\n",
        "trainer/settings/__init__.py": "",
        "trainer/settings/tree.py": "from cluster.config import ClusterConfig\nimport trainer.settings\n",
        "trainer/recipes/notes.txt": "import dataio",
        "cluster/__init__.py": "",
        "cluster/config.py": "'''import dataio'''\nfrom typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import dataio\n",
        "dataio/__init__.py": "",
        "tests/test_it.py": "import trainer.run\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_the_page_shows_the_packages_as_they_are() -> None:
    assert PROJECT == CHECKOUT
    assert main(["--check"]) == 0


def test_every_room_of_trainer_has_a_box() -> None:
    rooms = {f"trainer.{path.name}" for path in (PROJECT / "trainer").iterdir() if (path / "__init__.py").is_file()}
    assert rooms | {"trainer", "cluster", "dataio", "deploy", "benchmarks"} == set(boxes_of(PROJECT))


def test_imports_are_found_wherever_they_stand_but_where_only_type_checkers_look(project: Path) -> None:
    assert arrows_of(project) == {
        ("trainer", "trainer.drive"),
        ("trainer", "trainer.settings"),
        ("trainer.drive", "trainer.settings"),
        ("trainer.settings", "cluster"),
    }


def test_what_is_drawn(project: Path) -> None:
    assert picture(project).splitlines() == [
        "```mermaid",
        "flowchart TD",
        "  subgraph trainer",
        '    commands["predict, run"]',
        '    trainer_drive["drive"]',
        '    trainer_settings["settings"]',
        "  end",
        '  cluster["cluster"]',
        '  dataio["dataio"]',
        "  commands --> trainer_drive",
        "  trainer_drive --> trainer_settings",
        "  trainer_settings --> cluster",
        "```",
    ]


@given(ARROWS)
def test_what_is_left_leads_wherever_all_arrows_did(arrows: set[tuple[str, str]]) -> None:
    kept = reduced(arrows)
    assert kept <= arrows
    assert all(reachable(name, kept) == reachable(name, arrows) for name in NAMES)


@given(ARROWS)
def test_no_arrow_is_left_that_others_imply(arrows: set[tuple[str, str]]) -> None:
    kept = reduced(arrows)
    assert all(target not in reachable(source, kept - {(source, target)}) for source, target in kept)


@given(DOWNWARDS)
def test_without_a_circle_an_arrow_stays_just_if_no_longer_way_leads_there(arrows: set[tuple[str, str]]) -> None:
    implied = {(a, c) for a, b in arrows for c in reachable(b, arrows)}
    assert reduced(arrows) == arrows - implied


def test_a_page_is_written_checked_and_found_out(project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "design.md"
    page.write_text(f"before\n{BEGIN}old\n{END}after\n")
    assert main(["--check"], page=page, project=project) == 1
    assert "run python -m deploy.picture" in capsys.readouterr().err
    assert main([], page=page, project=project) == 0
    assert page.read_text() == f"before\n{BEGIN}{picture(project)}{END}after\n"
    assert main(["--check"], page=page, project=project) == 0
    (project / "trainer/settings/tree.py").write_text("import dataio\n")
    assert main(["--check"], page=page, project=project) == 1


@pytest.mark.parametrize("text", ["", BEGIN, END + BEGIN, BEGIN + END + END, BEGIN + BEGIN + END])
def test_a_page_without_its_marks_is_refused_and_left_alone(project: Path, tmp_path: Path, text: str) -> None:
    page = tmp_path / "design.md"
    page.write_text(text)
    with pytest.raises(ValueError, match="lacks the two lines"):
        main([], page=page, project=project)
    assert page.read_text() == text


def test_the_page_is_the_design() -> None:
    assert PAGE == PROJECT / "docs" / "design.md"
