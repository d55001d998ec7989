"""The command line `python -m trainer.push RUN REPOSITORY`: uploads a finished run's model to a Hugging Face hub (extra `hub`). What is
pushed is the model folder as it is (trainer.export), verified, in one commit: all of its files, or none.

Token and address are the hub client's own business: `hf auth login` or HF_TOKEN, and HF_ENDPOINT for another hub.
"""

from dataio.leaving import Leaving
from dataio.terminal import prepare_output

if __name__ == "__main__":
    leaving = Leaving()
    prepare_output()

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import tyro

from trainer.export.elsewhere import library_of
from trainer.export.model_folder import CARD_FILE, REMEMBERED_FILE, verified_remembered, verified_tokenizer, verified_weights
from trainer.runs.folder import RunFolder
from trainer.runs.model_files import CONFIG_FILE, TOKENIZER_FILE, WEIGHTS_FILE, described, find_model, takes_texts
from trainer.settings.cli import fail
from trainer.settings.programs import program
from trainer.settings.say import complain, say
from trainer.settings.texts import is_text
from trainer.settings.tree import ModelConfig, RunConfig


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Upload a finished run's model to a Hugging Face hub: weights, configuration and model card, in one commit."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """The run's folder (path or URI), or its name under --storage; or its model folder, wherever that was copied to."""
    repository: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="REPOSITORY")]
    """Where it goes on the hub, as OWNER/NAME. It is made if it is not there."""
    public: tyro.conf.FlagCreatePairsOff[bool] = False
    """Make a new repository public; else it is private. One that is there stays what it is."""
    message: str = ""
    """Of the commit."""
    storage: str = RunConfig().storage
    """Folder or URI that holds the runs' folders."""


def main(argv: Sequence[str]) -> int:
    """0; 1 if the hub refuses or does not answer. Exits with 2 (SystemExit) for wrong arguments or an unusable run."""
    arguments = tyro.cli(Arguments, prog=program("push"), args=argv)
    hub = _client()
    try:
        files = files_of(find_model(arguments.run, arguments.storage))
    except (ValueError, OSError) as error:
        fail(str(error))
    try:
        say(_push(hub, arguments, files))
    except ValueError as error:  # the name of the repository, before anything is sent
        fail(str(error))
    except (OSError, _network_error(hub)) as error:
        complain(f"error: the hub did not take it: {' '.join(str(error).split())}; log in by `hf auth login`, or set HF_TOKEN")
        return 1
    return 0


def files_of(folder: RunFolder) -> dict[str, bytes]:
    """The files to push, by name: the weights verified, and the card with the heading that a hub reads. ValueError for a damaged model."""
    description = described(folder)
    card = folder.read(CARD_FILE)
    remembered = verified_remembered(folder, description)
    return {
        WEIGHTS_FILE: verified_weights(folder, description),
        CONFIG_FILE: folder.read(CONFIG_FILE) or b"",
        CARD_FILE: _heading(ModelConfig(**description["model"])).encode() + (card or b""),
        **({REMEMBERED_FILE: remembered} if remembered is not None else {}),
        **({TOKENIZER_FILE: verified_tokenizer(folder, description)} if takes_texts(description) else {}),
    }


def _heading(config: ModelConfig) -> str:
    library = library_of(config)
    lines = [f"library_name: {library}"] if library == "timm" else []
    return "\n".join(["---", *lines, f"pipeline_tag: {'text' if is_text(config) else 'image'}-classification", "---", "", ""])


def _push(hub: Any, arguments: Arguments, files: dict[str, bytes]) -> str:
    """Make the repository and the commit. Returns the commit's address."""
    api = hub.HfApi(library_name="ray-finetune")
    made = api.create_repo(arguments.repository, private=not arguments.public, exist_ok=True)
    operations = [hub.CommitOperationAdd(path_in_repo=name, path_or_fileobj=data) for name, data in files.items()]
    message = arguments.message or f"The model of the run {arguments.run.rstrip('/').rpartition('/')[2]}"
    return str(api.create_commit(repo_id=made.repo_id, operations=operations, commit_message=message).commit_url)


def _client() -> Any:
    try:
        import huggingface_hub
    except ImportError:
        fail('pushing needs the package huggingface_hub; install the extra: pip install "huggingface_hub>=1.0" (extra `hub`)')
    return huggingface_hub


def _network_error(hub: Any) -> type[Exception]:
    """What the client raises where nobody answers: of the HTTP library that it uses, which differs between its versions. Its own error for
    an answer that refuses inherits from that."""
    error: type[Exception] = hub.errors.HfHubHTTPError.__bases__[0]
    return error


if __name__ == "__main__":
    leaving.by(lambda: main(sys.argv[1:]))
