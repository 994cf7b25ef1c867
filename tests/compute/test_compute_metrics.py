"""What workers count for Prometheus, held against the ledger and against the records of the runs."""

from pathlib import Path

import pytest
from prometheus_client import REGISTRY
from volumes import model_file, scan_file

from pipeline.compute.metrics import metered
from pipeline.ingest import ingest
from pipeline.plan import plan_segment
from pipeline.store.results import create_result

STAGES = ("read", "wait", "compute", "write")


def counted() -> dict[str, float]:
    """Return what is counted of columns so far."""
    work = {"work": "SegmentColumns"}
    found = {name: REGISTRY.get_sample_value(f"haloseg_{name}_total", work) for name in ("blocks", "voxels")}
    seconds = {each: REGISTRY.get_sample_value("haloseg_seconds_total", work | {"stage": each}) for each in STAGES}
    return {name: value or 0.0 for name, value in (found | seconds).items()}


def gained(before: dict[str, float]) -> dict[str, float]:
    return {name: value - before[name] for name, value in counted().items()}


def damaged(image: str) -> tuple[Path, bytes]:
    """Damage the last shard of an image; returns it, and what it was."""
    shard = max(each for each in Path(image, "0/c").rglob("*") if each.is_file())
    kept = shard.read_bytes()
    shard.write_bytes(bytes(each ^ 255 for each in kept[:-100]) + kept[-100:])
    return shard, kept


def test_shards_and_seconds_of_a_column_count_when_they_are_there_and_once(tmp_path):
    scan_file(tmp_path / "scan.tif", (160, 24, 24))
    image = str(ingest(str(tmp_path / "scan.tif"), str(tmp_path / "scan.zarr"), chunk=(16,), shard=(16,)).location)
    plan = plan_segment(image, model=model_file(tmp_path / "model.safetensors"), name="classes")
    assert (len(plan.columns.grid(plan.grid)), len(plan.grid)) == (1, 40)
    shard, kept = damaged(image)
    create_result(plan.image, plan.result)
    work, before = plan.work(), counted()
    state = work.setup()
    with metered(work="SegmentColumns"), pytest.raises(Exception, match="shard entry"):
        work.run(state, 0)
    early = gained(before)
    assert 0 < early["blocks"] == len(plan.done()) < 40
    assert early["voxels"] == sum(plan.grid.block(index).core.n_voxels for index in plan.done())
    assert early["compute"] > 0 < early["read"]
    shard.write_bytes(kept)
    between = counted()
    with metered(work="SegmentColumns") as meter:
        record = work.run(state, 0)
        live = gained(between)
        meter.end(record)
    late = gained(between)
    assert live["blocks"] == late["blocks"] == record.n_blocks == 40 - early["blocks"]
    assert live["voxels"] == late["voxels"] == record.n_voxels == 160 * 24 * 24 - early["voxels"]
    assert all(0 <= live[stage] <= late[stage] == pytest.approx(getattr(record, f"{stage}_s")) for stage in STAGES)
    assert live["compute"] > late["compute"] / 2
