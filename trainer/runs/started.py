"""The settings that a run was started with, from its folder. Called by the commands that take a finished run's settings for their own."""

from trainer.runs.folder import RunFolder
from trainer.settings.fields import as_begun
from trainer.settings.toml import from_toml
from trainer.settings.tree import RunConfig

SETTINGS_FILE = "config.toml"


def started_with(run: RunFolder) -> RunConfig:
    """ValueError if the folder has none, as a model folder by itself, or if they cannot be read."""
    text = run.read(SETTINGS_FILE)
    if text is None:
        raise ValueError(f"{run.location} has no {SETTINGS_FILE}, which says how the model was trained; give the folder that the run wrote")
    try:
        config: RunConfig = as_begun(from_toml(text.decode(), origin=f"{run.location}/{SETTINGS_FILE}"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{run.location}/{SETTINGS_FILE} is not UTF-8 text ({error.reason} at byte {error.start})") from None
    return config
