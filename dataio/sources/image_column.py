"""The column of a Parquet file that holds images, as the Hugging Face hub stores them: `struct{bytes, path}`, or plain binary.

Read by `huggingface` for training, and by the trainer's command that answers images wherever they lie. Which column it is where the name
does not say so, and what to tell a user then, is theirs.
"""

from typing import Any

import pyarrow as pa

from dataio.sources.source import text_of

IMAGE_COLUMNS = ("image", "img", "pixel_values", "picture", "photo", "bytes", "content")
"""Names that such a column has, the likeliest first."""


def holds_images(kind: Any) -> bool:
    """Whether a column of this Arrow type can hold encoded images."""
    if pa.types.is_struct(kind):
        return any(field.name == "bytes" and holds_images(field.type) for field in kind)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def images_in(column: Any) -> Any:
    """The encoded images of such a column, an Arrow array of binary; null where a row has none."""
    return _children(column)["bytes"] if pa.types.is_struct(column.type) else column


def paths_in(column: Any, count: int) -> list[str | None]:
    """The paths that the hub keeps beside the images. `column` is None where it was not read."""
    parts = _children(column) if column is not None and pa.types.is_struct(column.type) else {}
    return parts["path"].to_pylist() if "path" in parts else [None] * count


def key_of_row(path: str | None, stem: str, row: int) -> str:
    """What the image of a row is called: its path or, without one, the file's name and the row."""
    return text_of(path or f"{stem}/{row:08d}")


def why_no_image(path: str | None) -> str:
    """Of a row without bytes."""
    return "no image: null" if path is None else "no image: the row holds a path, but no bytes"


def _children(column: Any) -> dict[str, Any]:
    """The fields of an Arrow array of structs."""
    return dict(zip([field.name for field in column.type], column.flatten(), strict=True))  # flatten applies the struct's nulls
