"""The command line `python -m trainer.predict RUN IMAGE...`: a finished run's predictions for images, or for texts. Reads `model/` in the
run's folder, or a copy of it anywhere. With --out it answers any number of images, on this machine or a cluster, and writes Parquet files
(trainer.inference).
"""

from dataio.leaving import Leaving, leave_by, leaves
from dataio.terminal import prepare_output

if __name__ == "__main__":
    leaving = Leaving()
    prepare_output()

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import torch
import tyro

from cluster.machine import usable_cpus
from cluster.storage import is_uri
from cluster.text import shown
from dataio.formats import images_below
from dataio.text import address as address_of
from trainer.drive.guarded import guarded
from trainer.drive.signals import Signals, tell
from trainer.inference.job import Asked, Begun, Ended, begin, carry_out
from trainer.inference.predictor import Prediction, Predictor
from trainer.inference.refusals import reading
from trainer.inference.shard import Job
from trainer.runs.folder import RunFolder
from trainer.runs.model_files import described, find_model, takes_texts
from trainer.settings.cli import fail
from trainer.settings.programs import program
from trainer.settings.say import complain, say, say_json
from trainer.settings.tree import RunConfig
from trainer.settings.units import number, percent
from trainer.tasks.task import Task

if TYPE_CHECKING:
    from cluster.belongings import Belongings

LONGEST_PATH = 4096
MOST_CLASSES = 10
MOST_OF_TEXT = 80
"""Characters of a text that are shown beside its answer."""
PROJECT = Path(__file__).resolve().parents[1]
PACKAGES = ("cluster", "dataio", "trainer")


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Ask the model of a finished run about images, or about texts."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """The run's folder (path or URI), or its name under --storage; or its model folder, wherever that was copied to."""
    images: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE...")]
    """Image files, or folders of them. With --out also Parquet files, folders of them, and URIs of all these. For a model of texts .txt
    files, folders of them, and tables (.csv, .tsv, .jsonl, .parquet)."""
    out: str = ""
    """Folder or URI, new or empty, for Parquet files with the answers to any number of images or texts, by Ray on this machine or a
    cluster. Stopped or killed, the same command goes on."""
    top: int = 3
    """Number of classes or labels to show for each image."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print one JSON object per image and line instead of text."""
    raw: tyro.conf.FlagCreatePairsOff[bool] = False
    """Probabilities as the network gives them, not calibrated by the temperature that the run fitted. The answers are the same."""
    explain: str = ""
    """Folder, which is made if it is not there, for a picture of each image beside a map of where in it the answer comes from (Grad-CAM; of
    tokens, LayerCAM); of texts, for a page on which the words are marked that the answers come from."""
    fit: Literal["run", "refuse", "stretch", "crop"] = "run"
    """How to handle images whose size differs from the one the model was trained on. `run` uses the run's own `data.fit`."""
    storage: str = RunConfig().storage
    """Folder or URI that holds the runs' folders."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto uses a GPU if there is one."""
    workers: int = 0
    """With --out: processes that answer. 0: one a GPU, or one for 4 CPUs."""
    shard_images: int = 2048
    """With --out: images or texts a file. What is killed loses at most the files that are under way."""
    image_column: str = ""
    """With --out: of Parquet files, the column with the images, where its name does not say so."""
    text_column: str = ""
    """For a model of texts: the column of a table with the texts, or two for pairs; empty finds it by its usual names."""


def main(argv: Sequence[str]) -> int:
    """Return 0 if all images were classified, 1 if some could not be. Exits with 2 (SystemExit) for wrong arguments or an unusable run."""
    arguments = tyro.cli(Arguments, prog=program("predict"), args=argv)
    try:
        _check(arguments)
        if arguments.out:
            return _to_files(arguments)
        folder = find_model(arguments.run, arguments.storage)
        if takes_texts(described(folder)):
            return _of_texts(folder, arguments)
        _check_flags(arguments, of_texts=False)
        paths = list(image_paths(arguments.images))
        predictor = Predictor(
            folder,
            fit=None if arguments.fit == "run" else arguments.fit,
            device=None if arguments.device == "auto" else torch.device(arguments.device),
            is_calibrated=not arguments.raw,
            explain=arguments.explain,
        )
    except (ValueError, OSError) as error:
        fail(str(error))
    bad = 0
    for prediction in predictor.predict(paths, top=arguments.top):
        bad += bool(prediction.error)
        _show(prediction, predictor.task, as_json=arguments.json)
    if predictor.transparent:
        treated = f"put on {predictor.background}" if predictor.background else "its alpha channel dropped, whatever that shows"
        complain(
            f"{predictor.transparent} of {len(paths)} images with transparency: {treated}, as in this run's training (data.background)"
        )
    if bad:
        complain(f"{bad} of {len(paths)} images could not be classified")
    return 1 if bad else 0


def _of_texts(folder: RunFolder, arguments: Arguments) -> int:
    """Answer texts: 0; 1 if some could not be answered. ValueError for what does not work for them."""
    _check_flags(arguments, of_texts=True)
    from trainer.inference.text_page import TextPage
    from trainer.inference.texts import TextPredictor

    device = None if arguments.device == "auto" else torch.device(arguments.device)
    predictor = TextPredictor(folder, device=device, is_calibrated=not arguments.raw, explains=bool(arguments.explain))
    count = bad = cut = 0
    with ExitStack() as stack:
        page = stack.enter_context(TextPage(Path(arguments.explain), title=arguments.run)) if arguments.explain else None
        for answer in predictor.predict(arguments.images, text_column=arguments.text_column, top=arguments.top):
            count, bad, cut = count + 1, bad + bool(answer.error), cut + answer.was_cut
            said = "" if answer.error else shown(predictor.task.sentence(answer.answer), LONGEST_PATH)
            if arguments.json:
                say_json(answer.to_json())
            elif answer.error:
                complain(f"{shown(answer.key, LONGEST_PATH)}: {shown(answer.error)}")
            else:
                say(f"{shown(answer.key, LONGEST_PATH)}: {said}  {shown(' '.join(answer.text.split()), MOST_OF_TEXT)}")
            if page is not None and not answer.error:
                page.add(answer, said)
    if page is not None:
        complain(f"where the answers come from: {shown(page.path, LONGEST_PATH)}")
    if cut:
        complain(f"{cut} of {count} texts have more tokens than the model was trained with: their beginning was answered")
    if bad:
        complain(f"{bad} of {count} texts could not be answered")
    return 1 if bad else 0


def _check_flags(arguments: Arguments, *, of_texts: bool) -> None:
    """ValueError for a flag of the other kind of model."""
    if of_texts:
        given = {"--fit": "" if arguments.fit == "run" else arguments.fit, "--image-column": arguments.image_column}
    else:
        given = {"--text-column": arguments.text_column}
    one, other = ("images", "texts") if of_texts else ("texts", "images")
    for flag, value in given.items():
        if value:
            raise ValueError(f"{flag} {value} is of {one}, and {arguments.run} is a model of {other}; leave it out")


def _check(arguments: Arguments) -> None:
    if arguments.top < 1:
        raise ValueError(f"--top {arguments.top} shows nothing; use 1 or more")
    if arguments.workers < 0:
        raise ValueError(f"--workers {arguments.workers} is no number of processes; use 1 or more, or 0 to have it chosen")
    if arguments.shard_images < 1:
        raise ValueError(f"--shard-images {arguments.shard_images} is no number of images; use 1 or more")
    if arguments.out and arguments.explain:
        raise ValueError("--explain draws a picture for each image, and --out is for any number of them; give one of the two")
    if arguments.device == "cuda" and not torch.cuda.is_available() and not (arguments.out and os.environ.get("RAY_ADDRESS")):
        raise ValueError("--device cuda, but PyTorch sees no GPU here; use --device cpu or auto")
    if not arguments.out and (arguments.workers or arguments.image_column):
        flag = "--workers" if arguments.workers else "--image-column"
        raise ValueError(f"{flag} goes with --out FOLDER, where the answers are written to")


def _to_files(arguments: Arguments) -> int:
    """Answer all into files of --out: 0; 1 if some could not be read, or if Ray or a storage was lost; 128 + signal if stopped."""
    from cluster.belongings import belongings

    prepare_output(survive=True)  # it may take hours: the work does not depend on who reads along

    def work(signals: Signals) -> int:
        with reading(f"RUN {address_of(arguments.run)}", "give this user, or these credentials, the right to read it"):
            asked = _asked(arguments)
        begun = begin(asked, complain)
        with belongings(leave_by=leave_by) as ours, signals.leaving_by(ours.end_at_once):
            ended = _with_ray(asked, begun, ours)
        _show_ended(ended, asked, begun, as_json=arguments.json)
        return 1 if ended.counts.bad else 0

    return guarded(work, stopped="stopped; the same command goes on", goes_on="; the same command goes on")


def _asked(arguments: Arguments) -> Asked:
    folder = find_model(arguments.run, arguments.storage)
    of_texts = takes_texts(described(folder))
    _check_flags(arguments, of_texts=of_texts)
    is_local_out = not is_uri(arguments.out) and not arguments.out.startswith("file:")
    out = os.path.abspath(os.path.expanduser(arguments.out)) if is_local_out else arguments.out
    job = Job(
        out=out,
        model=folder.storage.uri,
        model_name=folder.name,
        model_sha256=described(folder)["file_sha256"],
        fit="" if arguments.fit == "run" else arguments.fit,
        top=arguments.top,
        calibrated=not arguments.raw,
        device=arguments.device,
        threads=1,
        unit="texts" if of_texts else "images",
    )
    return Asked(
        out=out,
        inputs=arguments.images,
        column=arguments.text_column if of_texts else arguments.image_column,
        job=job,
        shard_images=arguments.shard_images,
        workers=arguments.workers,
    )


def _with_ray(asked: Asked, begun: Begun, ours: "Belongings") -> Ended:
    from cluster.config import ClusterConfig
    from cluster.ray_cluster import ray_cluster

    def lost(name: str) -> None:
        tell(f"error: the {name} of this command's Ray died; the same command goes on")
        ours.end_at_once(1)

    is_verbose = bool(os.environ.get("FINETUNE_VERBOSE"))
    if not is_verbose:
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # it calls it an error that Ray Data's workers may be started again
    address = os.environ.get("RAY_ADDRESS", "")
    if begun.left:
        complain(f"joining the Ray cluster at {address}" if address else "starting a local Ray")
    with ray_cluster(
        ClusterConfig(),
        project=PROJECT,
        address=address,
        in_job="RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ,
        cpus=usable_cpus(),
        folder=ours.folder,
        on_lost=lost,
        packages=PACKAGES,
        verbose=is_verbose,
        process_ends=leaves(),
    ) as hardware:
        return carry_out(asked, begun, hardware, complain)


def _show_ended(ended: Ended, asked: Asked, begun: Begun, *, as_json: bool) -> None:
    if as_json:
        say_json(ended.to_json())
        return
    counts, unit = ended.counts, asked.job.unit
    say(f"{number(counts.images)} {unit} in {number(begun.plan.shards)} Parquet files in {address_of(asked.out)}")
    if ended.here:
        spent = asdict(ended.spent)
        whole = sum(spent.values()) or 1.0
        words = (f"waiting for {unit}", "the model", "writing")
        shares = ", ".join(f"{percent(seconds / whole, 0)} {word}" for word, seconds in zip(words, spent.values(), strict=True))
        say(f"  {number(ended.here)} of them now, {ended.here / ended.seconds:.0f} {unit}/s; of the workers' time {shares}")
    largest = sorted(counts.answers.items(), key=lambda item: -item[1])[:MOST_CLASSES]
    if largest:
        more = f", and {len(counts.answers) - len(largest)} more classes" if len(counts.answers) > len(largest) else ""
        say("  " + ", ".join(f"{shown(name)} {number(count)}" for name, count in largest) + more)
    if counts.unlike:
        say(f"  {number(counts.unlike)} unlike anything seen in training (column unlike_training)")
    if counts.transparent:
        say(f"  {number(counts.transparent)} with transparency, treated as in this run's training (data.background)")
    if counts.cut:
        say(f"  {number(counts.cut)} with more tokens than the model was trained with: their beginning was answered (column cut)")
    if counts.bad:
        complain(f"{number(counts.bad)} of {number(counts.images)} {unit} could not be read (column error says why)")


def image_paths(arguments: Sequence[str]) -> Iterator[str]:
    """The image files that the arguments name. A folder stands for all images below it, sorted. ValueError if a folder holds none."""
    if not arguments:
        raise ValueError("no IMAGE given; name image files, or a folder of them")
    for argument in arguments:
        if not os.path.isdir(argument):
            yield argument
            continue
        found = sorted(images_below(argument))
        if not found:
            raise ValueError(f"{argument} holds no image (.jpg, .png, .webp, ...); name another folder, or the files themselves")
        yield from found


def _show(prediction: Prediction, task: Task, *, as_json: bool) -> None:
    if as_json:
        say_json(prediction.to_json())
    elif prediction.error:
        complain(f"{shown(prediction.image, LONGEST_PATH)}: {shown(prediction.error)}")
    else:
        drawn = f"  (why: {shown(prediction.explanation, LONGEST_PATH)})" if prediction.explanation else ""
        strange = "  (unlike anything seen in training)" if prediction.is_unlike else ""
        say(f"{shown(prediction.image, LONGEST_PATH)}: {shown(task.sentence(prediction.answer), LONGEST_PATH)}{strange}{drawn}")


if __name__ == "__main__":
    leaving.by(lambda: main(sys.argv[1:]))
