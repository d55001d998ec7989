"""What each learning feature gains against itself switched off, on real data, in turns, with paired seeds and 95 % intervals.

    python -m benchmarks.learning [FEATURE...] [--task TASK...] [--seeds 3] [--full] [--folder DIR] [--keep FILE] [--json] [--out FILE]

EfficientNet-Lite0 with ImageNet weights (extra `quickstart`), by the recipe quickstart. Small, for two cores, unless --full: 32 pixels, 10
epochs, at most 500 images of a class. benchmarks/learning/features.py lists the features, tasks.py the data. An interval that holds 0
decides nothing: such a feature stays off by default.
"""

import sys
import tempfile
from pathlib import Path

from benchmarks.common import add_arguments, add_keep, described, finish, parser_of
from benchmarks.learning.features import FEATURES
from benchmarks.learning.measure import lines_of, measure
from benchmarks.learning.tasks import FULL, SMALL, TASKS


def main() -> int:
    parser = parser_of("learning", __doc__)
    parser.add_argument("features", nargs="*", metavar="FEATURE", help=f"all, or some of {', '.join(FEATURES)}")
    parser.add_argument("--task", nargs="+", choices=list(TASKS), default=list(TASKS), help="(all)")
    parser.add_argument("--seeds", type=int, default=3, help="(%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (%(default)s)")
    parser.add_argument("--full", action="store_true", help="the recipe's own size and length, all images; wants a GPU")
    parser.add_argument("--folder", type=Path, help="images in a folder for each class, for the task `folder`")
    add_keep(parser)
    add_arguments(parser)
    options = parser.parse_args()
    if unknown := sorted(set(options.features) - set(FEATURES)):
        parser.error(f"{unknown[0]} is no feature; they are {', '.join(FEATURES)}")
    chosen = [FEATURES[name] for name in options.features or FEATURES]
    with tempfile.TemporaryDirectory(prefix="benchmark-learning-") as folder:
        result = described("learning", options) | measure(
            chosen,
            {name: TASKS[name] for name in options.task},
            seeds=options.seeds,
            sizes=FULL if options.full else SMALL,
            threads=options.threads,
            folder=Path(folder),
            given=options.folder and options.folder.expanduser(),
            keep=options.keep,
        )
    return finish(result, options, lines_of(result))


if __name__ == "__main__":
    sys.exit(main())
