"""The value of a pretrained encoder: the recipe text-quickstart with it, from random weights, and beside what words alone say.

    python -m benchmarks.text_quickstart [--seeds 3] [--storage DIR] [--json] [--out FILE]

Runs `python -m trainer.run --config text-quickstart` with and without `--model.weights none`, in turns, and fits scikit-learn's logistic
regression on TF-IDF of words and pairs of words to the same training texts; its strength is chosen by cross-validation on them. All three
are tested on the same texts. `--storage` uses existing runs (a finished run is not repeated). Needs the extra `text-quickstart`, which
brings scikit-learn.
"""

import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.common import PROJECT, described, finish, mean_interval, target
from benchmarks.quickstart import lines_of, parsed, with_and_without
from dataio.sources.texts import rows_of

TEXTS = PROJECT / "dataio" / "samples" / "movie_snippets"
STRENGTHS = (0.3, 1.0, 3.0, 10.0, 30.0)
"""Of the regression: inverse regularisation."""
FOLDS = 5
POINTS_ABOVE_RANDOM = 15.0


def words_alone(folder: Path = TEXTS) -> dict[str, Any]:
    """Accuracy of logistic regression on TF-IDF, trained and tested on the recipe's own texts."""
    import sklearn
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV
    from sklearn.pipeline import make_pipeline

    begin = time.perf_counter()
    splits = {split: [cells for _, cells in rows_of(folder / f"{split}.csv", ("text", "label"))] for split in ("train", "test")}
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    search = GridSearchCV(
        make_pipeline(words, LogisticRegression(max_iter=1000)), {"logisticregression__C": STRENGTHS}, cv=FOLDS, scoring="accuracy"
    )
    search.fit(*zip(*splits["train"], strict=True))
    texts, labels = zip(*splits["test"], strict=True)
    return {
        "test_accuracy": float(search.score(texts, labels)),
        "test_count": len(labels),
        "strength": search.best_params_["logisticregression__C"],
        "seconds": time.perf_counter() - begin,
        "versions": {"scikit-learn": sklearn.__version__},
    }


def targets_of(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    above_words = [100 * (run["test_accuracy"] - result["tfidf"]["test_accuracy"]) for run in result["pretrained"]["runs"]]
    claims = (
        ("random weights", result["interval"], POINTS_ABOVE_RANDOM),
        ("logistic regression on TF-IDF", mean_interval(above_words), 0.0),
    )
    return [
        target(
            f"points of accuracy above {name}",
            found["mean"],
            at_least=least,
            interval=None if found["low"] is None else (found["low"], found["high"]),
        )
        for name, found, least in claims
    ]


def main() -> int:
    options = parsed("text_quickstart", __doc__)
    result = described("text_quickstart", options)
    with tempfile.TemporaryDirectory() as temp:
        result |= {"tfidf": words_alone()} | with_and_without("text-quickstart", options.storage or Path(temp), options.seeds)
    result["targets"] = targets_of(result)
    row = result["tfidf"]
    return finish(result, options, [*lines_of(result), f"{'tfidf':10}  test accuracy {row['test_accuracy']:.2%} of {row['test_count']}"])


if __name__ == "__main__":
    sys.exit(main())
