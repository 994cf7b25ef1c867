"""The flow that makes an image of one scan."""

from __future__ import annotations

from typing import cast

from prefect import flow
from prefect.states import Cancelled

from flows.parameters import ImagePath, Overwrite, ScanPath
from flows.segment import ingest_stage
from flows.stages import failed
from flows.stopping import pausable
from flows.watching import logged
from pipeline.errors import GivenUpError, PipelineError
from pipeline.store.lease import held
from pipeline.store.location import Location
from pipeline.store.roots import check_paths


@flow(name="ingest", flow_run_name="ingest {scan}")
def ingest_scan(scan: ScanPath, image: ImagePath, overwrite: Overwrite = False) -> str:
    """Make the OME-Zarr image of a scan, with pyramid and statistics; returns its path."""
    try:
        check_paths(scan, image)
        with pausable(), logged(), held(Location(image).absolute()):
            return ingest_stage(scan, image, overwrite=overwrite)[0]
    except GivenUpError as error:
        return cast("str", Cancelled(message=str(error)))
    except PipelineError as error:
        return cast("str", failed(error))
