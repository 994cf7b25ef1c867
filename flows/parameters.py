"""The parameters that flows share, typed and described, so that the Prefect UI shows a form that explains itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field, GetJsonSchemaHandler
from pydantic_core import CoreSchema

from pipeline.config import Precision, Tta


@dataclass(frozen=True, slots=True)
class Described:
    """Says in the form what a parameter is for; of ``Field`` Prefect 3.8.8 drops it, see its process_v2_params."""

    text: str

    def __get_pydantic_json_schema__(self, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """Return the schema of the type with the description in it."""
        return {**handler(core_schema), "description": self.text}


ScanPath = Annotated[str, Described("Path or URL of the scan, or of an image that was ingested before")]
ImagePath = Annotated[str, Described("Path or URL of the OME-Zarr image to make, ending in .zarr")]
ModelPath = Annotated[str, Described("Path or URL of the model file, or a name such as cells or cells@2")]
LabelName = Annotated[str, Described("The label volume, IMAGE/labels/NAME, or IMAGE/predictions/NAME")]
InstancesName = Annotated[
    str | None, Described("Then make IMAGE/labels/NAME, too: an id for each object of the classes; empty: none")
]
TruthPath = Annotated[
    str | None, Described("What to compare with: a label volume or a scan of integers; of predictions an image")
]
Ignore = Annotated[
    int | None, Described("Value of the truth where nobody has labelled, which does not count; empty: all counts")
]
Cluster = Annotated[str, Described('"local", or the address of a Dask scheduler such as tls://host:8786')]
Workers = Annotated[
    Annotated[int, Field(ge=1)] | None,
    Described("Worker processes of a local cluster; empty: one for each GPU, or 2"),
]
Budget = Annotated[
    Annotated[int, Field(ge=1)] | None,
    Described("Memory of one worker for activations, weights and buffers, bytes; by default 1 GiB, on a GPU 4"),
]
Numbers = Annotated[
    Precision, Described("What the network computes in; on a GPU tf32 is 3 to 7 times as fast as float32")
]
Augmentation = Annotated[
    Tta,
    Described("Mean over flips of the scan, 4 times the work in 2-D and 8 in 3-D; rotations: twice as many"),
]
Shard = Annotated[
    tuple[int, ...] | None, Described("Voxels that are written whole, along each axis; by the scan's size")
]
ArchivePath = Annotated[str, Described("Folder or URL prefix of the scans")]
Pattern = Annotated[str, Described('Globs of the scans, separated by commas; "*/" takes folders of slices')]
ImageFolder = Annotated[str | None, Described("Where images go; empty: each beside its scan")]
TruthTemplate = Annotated[
    str | None, Described('Where a scan\'s truth lies, from its folder: "{stem}-truth.tif"; empty: none')
]
Limit = Annotated[int | None, Field(ge=1), Described("At most so many scans in this run; empty: all")]
BudgetHours = Annotated[float | None, Field(gt=0), Described("No scan is begun after so many hours; empty: no limit")]
Settle = Annotated[float, Field(ge=0), Described("A scan that was changed fewer seconds ago is still being copied")]
AtOnce = Annotated[int, Field(ge=1, le=16), Described("Scans in work at once, so that workers never wait")]
Priority = Annotated[list[str], Described("Globs: scans of the first go first, and so on; then the oldest")]
Overwrite = Annotated[bool, Described("Delete the image that is there, with its labels, first")]
TruthName = Annotated[
    str | None, Described("The label volume of each image to learn, or several, A,B; empty with targets")
]
HeldOut = Annotated[list[str], Described("Images to validate on, not to learn from; empty: a part of each")]
Targets = Annotated[list[str], Described("What to make of each image, then of those held out, in order")]
ImagePaths = Annotated[list[str], Field(min_length=1), Described("Images to learn from, each with the labels")]
Minutes = Annotated[float, Field(gt=0), Described("Learn for so long at most, all members together")]
Members = Annotated[
    int, Field(ge=1, le=16), Described("So many networks learn, one after another, and make one model, an ensemble")
]
RecipePath = Annotated[
    str | None, Described("A recipe that ships, such as membrane2d, or one in TOML; empty: the usual settings")
]
