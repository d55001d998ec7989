"""The file explanations.parquet: where in the images of the worst and most telling test samples the model's answers come from. Rank 0
writes it at a run's end (trainer.rank.explain), the report reads it. Imports no torch.

A row has a sample's id in the split and its map, from 0 to 255, row by row: a few bytes for each place that the network still tells apart,
and so some hundred kilobytes at most. What the maps are of is in the file's metadata.
"""

import io
import json
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from dataio.config import Fit

EXPLANATIONS_FILE = "explanations.parquet"
_META = b"finetune.explanations"
_MOST_PLACES = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class AboutMaps:
    """What was explained, and how."""

    step: int
    split: str
    dataset_fingerprint: str
    method: str = ""
    """Grad-CAM or LayerCAM."""
    layer: str = ""
    """The module whose output was looked at."""
    grid: tuple[int, int] = (1, 1)
    """(rows, columns) of a map."""
    image_hw: tuple[int, int] = (0, 0)
    """(height, width) of the images as the loader makes them."""
    fit: Fit = "refuse"
    """How they were brought to that size."""
    note: str = ""
    """Why there are no maps; empty if there are."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Explanations:
    """Maps by sample."""

    about: AboutMaps
    ids: npt.NDArray[np.int64]  # (n,)
    maps: npt.NDArray[np.uint8]  # (n, rows, columns)

    def by_id(self) -> dict[int, npt.NDArray[np.uint8]]:
        return {int(sample): each for sample, each in zip(self.ids, self.maps, strict=True)}

    def to_parquet(self) -> bytes:
        rows, columns = self.about.grid
        flat = pa.FixedSizeListArray.from_arrays(pa.array(self.maps.reshape(-1)), rows * columns)
        schema = pa.schema([pa.field("id", pa.int64(), nullable=False), pa.field("map", flat.type, nullable=False)])
        meta = {_META: json.dumps(asdict(self.about))}
        sink = io.BytesIO()
        pq.write_table(pa.Table.from_arrays([pa.array(self.ids, pa.int64()), flat], schema=schema.with_metadata(meta)), sink)
        return sink.getvalue()

    @classmethod
    def from_parquet(cls, data: bytes) -> "Explanations":
        """ValueError if `data` did not come from `to_parquet`."""
        try:
            table = pq.read_table(io.BytesIO(data))
            said: dict[str, Any] = json.loads((table.schema.metadata or {})[_META])
            given: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in said.items()}
            about = AboutMaps(**given)
            rows, columns = (int(side) for side in about.grid)
            if not 0 < rows * columns <= _MOST_PLACES or about.fit not in ("refuse", "stretch", "crop"):
                raise ValueError(f"a map of {rows} x {columns} places, {about.fit!r:.20}")
            flat = np.asarray(table["map"].combine_chunks().flatten().to_numpy(zero_copy_only=False))
            maps = flat.astype(np.uint8).reshape(table.num_rows, rows, columns)
        except (pa.ArrowException, OSError, KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"it is no file of explanations ({error})") from error
        return cls(about=about, ids=table["id"].to_numpy(), maps=maps)
