"""Finds the splits and the class folders in a folder of images. Pure decisions over a `Tree`, which `scan` reads once.

Called by folder and by `open_source`. A folder's name decides which split it is (`Training`, `seg_test`), its content whether it can be
one: a split holds class folders, and a folder without an image is no class. What could be meant in two ways is refused with a question,
never guessed. `formerly_found` gives what an earlier rule found, so that data converted by that rule are recognised.
"""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from dataio.formats import JUNK, NOT_DECODED, is_image_file
from dataio.sources.source import SourceError, key_of
from dataio.sources.splits import ALIASES

_DEEPEST = 64
_WORDS: Mapping[str, str] = {
    **dict.fromkeys(("train", "training", "trainset", "trainingset"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev", "validate", "validationset", "valset"), "validation"),
    **dict.fromkeys(("test", "testing", "testset", "testingset"), "test"),
    **dict.fromkeys(("unlabelled", "unlabeled"), "unlabelled"),
}
_FORMER_SUFFIXES = frozenset(
    """
    .png .apng .jpg .jpeg .jpe .jfif .webp .bmp .dib .tif .tiff .gif .ppm .pgm .pbm .pnm .jp2 .j2k .heic .heif .avif .ico .tga
    """.split()  # noqa: SIM905
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Tree:
    """A folder and what is below it, without hidden names."""

    path: Path
    images: tuple[Path, ...] = ()
    """Files directly in the folder that are read as images."""
    others: tuple[Path, ...] = ()
    """The other files directly in it."""
    folders: tuple["Tree", ...] = ()
    """Sorted by name."""
    is_link: bool = False
    is_junk: bool = False
    problem: str = ""
    """Why nothing of the folder is known."""

    @property
    def name(self) -> str:
        return self.path.name

    @cached_property
    def has_images(self) -> bool:
        """Whether the folder holds an image at any depth."""
        return any(tree.images for tree in self.below())

    @cached_property
    def all_images(self) -> tuple[Path, ...]:
        """All images at any depth, sorted."""
        return tuple(sorted(path for tree in self.below() for path in tree.images))

    def with_images(self) -> list["Tree"]:
        """The folders directly below that hold images."""
        return [tree for tree in self.folders if not tree.is_junk and tree.has_images]

    def below(self, *, junk: bool = False) -> Iterator["Tree"]:
        """The folder and all below it; links to folders are not followed, and junk only if asked for."""
        yield self
        for tree in self.folders:
            if not tree.is_link and (junk or not tree.is_junk):
                yield from tree.below(junk=junk)

    def files(self) -> Iterator[Path]:
        """All files at any depth, in junk too."""
        return (path for tree in self.below(junk=True) for path in (*tree.images, *tree.others))


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """What a folder holds."""

    splits: Mapping[str, Tree]
    """Split -> the tree whose folders are its classes; of `unlabelled` the tree with its images. `train` is among them."""
    left_out: frozenset[Path] = frozenset()
    """Folders beside the class folders that are no class."""
    not_read: tuple[str, ...] = ()

    def classes(self, split: str) -> dict[str, Tree]:
        """Class -> its folder, sorted."""
        found = {key_of(os.fsencode(tree.name)): tree for tree in self.splits[split].with_images() if tree.path not in self.left_out}
        return dict(sorted(found.items()))


def scan(folder: Path, is_sample: Callable[[Path], bool] = is_image_file) -> Tree:
    """Reads the names below a folder, and the first bytes of files whose names do not say what they are. Links to folders are followed
    where they may be splits or classes, but not below another link. `is_sample` says which files are the samples: the tree's `images`.
    SourceError if the folder itself cannot be read."""
    tree = _scan(folder, is_sample, depth=0, follow=True)
    if tree.problem:
        raise SourceError(f"{folder} cannot be read: {tree.problem}; make it readable, or name another --data.path")
    return tree


def _scan(
    folder: Path, is_sample: Callable[[Path], bool], *, depth: int, follow: bool, is_link: bool = False, is_junk: bool = False
) -> Tree:
    if depth > _DEEPEST:
        return Tree(path=folder, is_link=is_link, is_junk=is_junk, problem=f"deeper than {_DEEPEST} folders")
    try:
        with os.scandir(folder) as found:
            entries = sorted((entry.name, entry.is_dir(), entry.is_symlink()) for entry in found if not entry.name.startswith("."))
    except OSError as error:
        return Tree(path=folder, is_link=is_link, is_junk=is_junk, problem=error.strerror or str(error))
    images: list[Path] = []
    others: list[Path] = []
    folders: list[Tree] = []
    for name, is_folder, link in entries:
        path, junk = folder / name, is_junk or name.lower() in JUNK
        if not is_folder:
            (images if not junk and is_sample(path) else others).append(path)
        elif link and not follow:
            folders.append(Tree(path=path, is_link=True, problem="a link"))
        else:
            may_hold_classes = not link and not is_link and _meaning(name) is not None
            folders.append(_scan(path, is_sample, depth=depth + 1, follow=may_hold_classes, is_link=link, is_junk=junk))
    return Tree(path=folder, images=tuple(images), others=tuple(others), folders=tuple(folders), is_link=is_link, is_junk=is_junk)


def without_labels(root: Tree) -> Tree:
    """The part of a folder to read images from whose labels do not matter: its split `unlabelled` if it has one, else `train`, so that no
    image of a test split is among them; else all of it."""
    found = _splits(root)
    return found.get("unlabelled") or found.get("train") or root


def find_layout(root: Tree, *, nested: bool = True) -> Layout | None:
    """The splits and classes; None if no folder below holds an image. SourceError for a folder that can be read in two ways. With `nested`,
    a lone folder between the given one and the class folders is passed through."""
    folder = root
    while True:
        found = _splits(folder)
        if "train" in found:
            return _with_train(root, folder, found, nested=nested)
        classes = [tree for tree in folder.with_images() if tree is not found.get("unlabelled")]
        if not nested or len(classes) != 1 or folder.images or split_meant(classes[0].name) or not _is_wrapper(classes[0]):
            break
        folder = classes[0]
    if not classes:
        _check_decoded(folder)
        return None
    _check_no_split(folder, classes)
    splits = {"train": folder} | ({"unlabelled": found["unlabelled"]} if "unlabelled" in found else {})
    left_out = frozenset({found["unlabelled"].path} if "unlabelled" in found else ())
    layout = Layout(splits=splits, left_out=left_out)
    return _told(root, layout)


def _with_train(root: Tree, folder: Tree, found: Mapping[str, Tree], *, nested: bool) -> Layout:
    splits = dict(found)
    if nested:
        splits["train"] = _unwrapped(splits["train"], frozenset())
        known = frozenset(tree.name for tree in splits["train"].with_images())
        splits |= {name: _unwrapped(tree, known) for name, tree in found.items() if name in ("validation", "test")}
    return _told(root, Layout(splits=splits))


def _unwrapped(split: Tree, known: frozenset[str]) -> Tree:
    """`seg_train/seg_train/cat` -> `seg_train/seg_train`: a split's lone folder whose folders are the classes. With `known`, the classes of
    train, a lone folder is passed through if it holds any of them."""
    while len(inner := split.with_images()) == 1 and inner[0].name not in known and not split.images:
        if not (known & {tree.name for tree in inner[0].with_images()} if known else _is_wrapper(inner[0])):
            break
        split = inner[0]
    return split


def _is_wrapper(tree: Tree) -> bool:
    """Whether a lone folder only wraps others: several classes, or splits."""
    inner = tree.with_images()
    if tree.images or not inner:
        return False
    return len(inner) > 1 or "train" in _splits(tree) or _is_wrapper(inner[0])


def _splits(folder: Tree) -> dict[str, Tree]:
    """Split -> its folder, of those directly below that can be one, in the order of ALIASES."""
    candidates = folder.with_images()
    named = {tree.name: tree for tree in candidates}
    found: dict[str, Tree] = {}
    for split, aliases in ALIASES.items():
        can_be = [tree for name in aliases if (tree := named.get(name)) is not None and (split == "unlabelled" or tree.with_images())]
        can_be += [
            tree
            for name, tree in named.items()
            if tree not in can_be and split_meant(name) == split and (split == "unlabelled" or tree.with_images())
        ]
        if len(can_be) > 1 and can_be[0].name not in aliases:
            raise SourceError(
                f"{folder.path} holds {can_be[0].name} and {can_be[1].name}, which both look like its {split} split; "
                f"rename one of them, or move it away"
            )
        if can_be:
            found[split] = can_be[0]
    return found if "train" in found else _compound(candidates) or found


def _compound(candidates: list[Tree]) -> dict[str, Tree]:
    """Splits like `seg_train`, `seg_test`: the same words around the split's, in train and at least one other."""
    by_rest: dict[tuple[str, ...], dict[str, Tree]] = {}
    for tree in candidates:
        if tree.with_images() and (meant := _meaning(tree.name)) is not None and meant[1]:
            by_rest.setdefault(meant[1], {}).setdefault(meant[0], tree)
    return next((found for found in by_rest.values() if "train" in found and len(found) > 1), {})


def _meaning(name: str) -> tuple[str, tuple[str, ...]] | None:
    """The split that a name speaks of, and the words around the split's: `seg_train` -> (`train`, (`seg`,)). None if it speaks of none."""
    if (split := split_meant(name)) is not None:
        return split, ()
    words = [word for word in re.split(r"[^a-z0-9]+", name.lower()) if word]
    splits = [word for word in words if word in _WORDS]
    return (_WORDS[splits[0]], tuple(word for word in words if word not in _WORDS)) if len(splits) == 1 else None


def split_meant(name: str) -> str | None:
    """The split that a name alone stands for, whatever its case: `Training`, `VAL`."""
    return _WORDS.get(_plain(name))


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "", name.lower())


def _check_no_split(folder: Tree, classes: list[Tree]) -> None:
    """Refuses class folders that look like something else."""
    by_rest: dict[tuple[str, ...], dict[str, str]] = {}
    for tree in classes:
        if (meant := _meaning(tree.name)) is not None:
            by_rest.setdefault(meant[1], {}).setdefault(meant[0], tree.name)
    if several := next((found for found in by_rest.values() if len(found) > 1), None):
        raise SourceError(
            f"{folder.path}: are {', '.join(sorted(several.values()))} splits? They hold images, but no folder of images for each class. "
            f"Sort the images into class folders ({next(iter(several.values()))}/CLASS/...), or write their labels into a table: "
            f"--data.path {folder.path}/labels.csv"
        )
    names = {tree.name for tree in classes}
    for tree in classes:
        inner = [below.name for below in tree.with_images()]
        same = [name for name in inner if name in names and name != tree.name]
        is_split = split_meant(tree.name) and inner
        if is_split and len(classes) == 1:
            raise SourceError(
                f"{folder.path} holds {tree.name}, but no folder to train with, named train; "
                f"to evaluate a run on it, name that folder: --data.path {tree.path}"
            )
        if len(same) > 1 or (is_split and (same or len(inner) > 1)):
            raise SourceError(
                f"{folder.path}: is {tree.name} a class? It holds folders {', '.join(inner[:5])} as if they were classes. If it is a "
                f"split, put the class folders beside it into {folder.path}/train; if it is a copy, move it away"
            )


def _check_decoded(folder: Tree) -> None:
    """Refuses a class whose images are all in formats that nothing here decodes: it would vanish."""
    for tree in folder.folders:
        if tree.is_junk or tree.has_images:
            continue
        found = Counter(path.suffix.lower() for below in tree.below() for path in below.others if path.suffix.lower() in NOT_DECODED)
        if found:
            suffix, count = found.most_common(1)[0]
            raise SourceError(
                f"{tree.path} holds no image that can be decoded here, but {count} {suffix}; convert them to JPEG or PNG, or move them away"
            )


def _told(root: Tree, layout: Layout) -> Layout:
    """The layout with a list of what is not read of the tree."""
    read: set[Tree] = set()
    for split, tree in layout.splits.items():
        if split != "unlabelled":
            _check_decoded(tree)
        for found in [tree] if split == "unlabelled" else layout.classes(split).values():
            read.update(found.below())
    holders = {tree for split, tree in layout.splits.items() if split != "unlabelled"}  # of class folders
    above = {parent for tree in layout.splits.values() for parent in (tree.path, *tree.path.parents)}
    files: Counter[str] = Counter()
    folders: list[str] = []

    def look(tree: Tree) -> None:
        files["outside of class folders"] += 0 if tree in read else len(tree.images)
        files.update(path.suffix.lower() or "without suffix" for path in tree.others if path.name.lower() not in JUNK)
        for below in tree.folders:
            name = key_of(os.fsencode(below.path.relative_to(root.path)))
            if below.is_junk:
                folders.append(f"{name}/ ({_counted(sum(1 for _ in below.files()), 'file')})")
            elif below.problem:
                folders.append(f"{name}/ ({below.problem})")
            elif below.path not in above and below.has_images and read.isdisjoint(below.below()):
                folders.append(f"{name}/ ({_counted(sum(len(each.images) for each in below.below()), 'image')})")
            elif tree in holders and below.path not in above and not below.has_images:
                folders.append(f"{name}/ (no image)")
            else:
                look(below)

    look(root)
    listed = tuple(f"{count} {what}" for what, count in sorted(files.items()) if count)
    return Layout(splits=layout.splits, left_out=layout.left_out, not_read=(*listed, *folders))


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


# What an earlier rule found: a split was a folder of exactly that name, an image was known by its suffix, a folder with any file was a
# class.


@dataclass(frozen=True, kw_only=True, slots=True)
class Former:
    """Split -> class -> its images; `train_is_root` if the class folders lay in the given folder itself."""

    splits: Mapping[str, Mapping[str, tuple[Path, ...]]]
    train_is_root: bool

    def files(self, split: str) -> list[Path]:
        return [path for paths in self.splits[split].values() for path in paths]


def formerly_found(root: Tree) -> Former | None:
    """What the earlier rule read of the folder; None if it refused it. `unlabelled` is one class of the name ''."""
    named = {tree.name: tree for tree in root.folders}
    found: dict[str, Tree] = {}
    for split, names in ALIASES.items():
        trees = [named[name] for name in names if name in named]
        can_be = next(
            (tree for tree in trees if (any(map(_was_image, tree.files())) if split == "unlabelled" else _former_has_images(tree, None))),
            None,
        )
        if can_be is not None:
            found[split] = can_be
    unlabelled = found.pop("unlabelled", None)
    train_is_root = "train" not in found
    if train_is_root:
        if not _former_has_images(root, unlabelled):
            return None
        found = {"train": root}
    splits: dict[str, Mapping[str, tuple[Path, ...]]] = {
        split: {name: tuple(_former_images(tree)) for name, tree in _former_classes(folder, unlabelled).items()}
        for split, folder in found.items()
    }
    if unlabelled is not None:
        splits["unlabelled"] = {"": tuple(_former_images(unlabelled))}
    return Former(splits=splits, train_is_root=train_is_root)


def _former_classes(folder: Tree, leave_out: Tree | None) -> dict[str, Tree]:
    found = {key_of(os.fsencode(tree.name)): tree for tree in folder.folders if tree is not leave_out and any(True for _ in tree.files())}
    return dict(sorted(found.items()))


def _former_has_images(folder: Tree, leave_out: Tree | None) -> bool:
    return any(any(map(_was_image, tree.files())) for tree in folder.folders if tree is not leave_out)


def _former_images(tree: Tree) -> list[Path]:
    return sorted(filter(_was_image, tree.files()))


def _was_image(path: Path) -> bool:
    return path.suffix.lower() in _FORMER_SUFFIXES
