"""Finds texts that are unlike the others of their data set: very short or long, as long as data.max_tokens allows, of tokens that the
tokenizer does not know, in another script, without letters. Pure; __main__.py calls it with what texts.py knows.

Lengths are judged as looks.py judges images, by robust standard deviations. What more than a RARE share of the texts have in common is how
the data are, and odd in none of them; `notes_on` says it where a setting or another tokenizer mends it.
"""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from dataio.manifest import Manifest
from trainer.audit.looks import Odd, far_from_median
from trainer.audit.texts import GatheredTexts
from trainer.settings.units import number, percent

RARE = 0.05
MOSTLY = 0.5
"""Of a text's tokens, those that are unknown in a text that is odd for them."""
UNKNOWN, WITHOUT_LETTERS, FULL = "mostly unknown tokens", "without letters", "as long as data.max_tokens allows, perhaps cut"

Mask = npt.NDArray[np.bool_]


def odd_texts(found: GatheredTexts, manifest: Manifest) -> list[Odd]:
    """The farthest first; a text that is odd in several ways is there several times."""
    every = np.arange(found.count)
    odd = far_from_median("short", "long", np.maximum(found.words, 1).astype(np.float64), every, is_ratio=True)
    for what, is_so in _ways(found, manifest):
        if is_so.sum() <= RARE * found.count:
            odd += [Odd(sample=sample, what=what, value=1.0, median=0.0, far=np.inf) for sample in np.flatnonzero(is_so).tolist()]
    return sorted(odd, key=lambda each: (-each.far, each.sample, each.what))


def notes_on(found: GatheredTexts, manifest: Manifest) -> list[str]:
    """What the user should know of texts that are too many to be odd."""
    mend = {
        FULL: f"are as long as data.max_tokens={manifest.texts.max_tokens if manifest.texts else 0} allows, most of them cut; more tokens "
        "keep more of them",
        UNKNOWN: "consist mostly of tokens that the tokenizer does not know; a model of their language knows them",
    }
    counts = {what: int(is_so.sum()) for what, is_so in _ways(found, manifest) if what in mend}
    return [
        f"{number(counts[what])} of {number(found.count)} texts ({percent(counts[what] / found.count)}) {words}"
        for what, words in mend.items()
        if counts[what] > RARE * found.count
    ]


def _ways(found: GatheredTexts, manifest: Manifest) -> Iterator[tuple[str, Mask]]:
    """(what it is, of which texts) for what is so or not."""
    for script, name in enumerate(found.script_names):
        yield f"in {name.capitalize()} script", found.scripts == script
    yield WITHOUT_LETTERS, found.scripts < 0
    yield UNKNOWN, found.unknown >= MOSTLY
    texts = manifest.texts
    is_cut = texts is not None and texts.too_long == "cut" and texts.cut > 0
    yield FULL, (found.tokens == texts.max_tokens) if texts is not None and is_cut else np.zeros(found.count, bool)
