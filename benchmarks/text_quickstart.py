"""The value of a pretrained encoder: the recipe text-quickstart with it, from random weights, and beside what words alone say.

    python -m benchmarks.text_quickstart --json

Runs `python -m trainer.run --config text-quickstart` twice, with and without `--model.weights none`, and fits scikit-learn's logistic
regression on TF-IDF of words and pairs of words to the same training texts; its strength is chosen by cross-validation on them. All three
are tested on the same texts. `--storage` uses existing runs (a finished run is not repeated). Needs the extra `text-quickstart`, which
brings scikit-learn.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from dataio.sources.texts import rows_of

PROJECT = Path(__file__).resolve().parents[1]
TEXTS = PROJECT / "dataio" / "samples" / "movie_snippets"
VARIANTS = {"pretrained": [], "random": ["--model.weights", "none"]}
KEYS = ("test_accuracy", "test_mcc", "test_count", "images_per_second", "seconds", "goodput", "weights_sha256", "accounting", "versions")
STRENGTHS = (0.3, 1.0, 3.0, 10.0, 30.0)
"""Of the regression: inverse regularisation."""
FOLDS = 5


def measure(storage: Path) -> dict[str, Any]:
    """Variant -> the key numbers of its summary; those of the peer under `tfidf`."""
    result: dict[str, Any] = {"tfidf": words_alone()}
    for variant, flags in VARIANTS.items():
        name = f"text-quickstart-{variant}"
        command = [sys.executable, "-m", "trainer.run", "--config", "text-quickstart", "--storage", str(storage), "--run", name, *flags]
        subprocess.run(command, cwd=PROJECT, check=True, stdout=sys.stderr)
        summary = json.loads((storage / name / "summary.json").read_text())
        result[variant] = {key: summary[key] for key in KEYS}
    accuracy = result["pretrained"]["test_accuracy"]
    result["points_above_random"] = 100 * (accuracy - result["random"]["test_accuracy"])
    result["points_above_tfidf"] = 100 * (accuracy - result["tfidf"]["test_accuracy"])
    return result


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


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.text_quickstart", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--storage", type=Path, help="where the runs are kept; a temporary folder if not given")
    parser.add_argument("--hardware", default=f"{os.cpu_count()} CPUs", help="what to call this machine (%(default)s)")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temp:
        result = measure(args.storage or Path(temp)) | {
            "hardware": args.hardware,
            "python_command": "python -m benchmarks.text_quickstart --json",
        }
    if args.json:
        print(json.dumps(result, indent=1))
        return 0
    for variant in (*VARIANTS, "tfidf"):
        print(f"{variant:10}  test accuracy {result[variant]['test_accuracy']:.2%} of {result[variant]['test_count']}")
    print(f"{result['points_above_random']:.1f} points above random weights, {result['points_above_tfidf']:.1f} above words alone")
    return 0


if __name__ == "__main__":
    sys.exit(main())
