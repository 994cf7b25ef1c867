"""Reports: what a picture of a result shows."""

import imagecodecs
import numpy as np
import pytest
from volumes import model_file, scan_file

from pipeline.compute.runner import run_serial
from pipeline.ingest import ingest, ingest_labels
from pipeline.plan import plan_segment
from pipeline.report import picture
from pipeline.segment import segment
from pipeline.store.image import open_image
from pipeline.store.labels import colour_of, open_labels
from pipeline.unet.settings import Padding, UNetSettings

SHAPE = (3, 40, 30)
SETTINGS = UNetSettings(dims=2, width=4, depth=1, n_classes=3, padding=Padding.SAME)


@pytest.mark.parametrize("values", [(3, 9, 200, 255), (0, 1, 2, 255)], ids=["of the model", "indices"])
@pytest.mark.parametrize("there", [(0, 1, 2), (0, 2), (1, 2), (2,), (1, 3), (0, 2, 3), (0, 1, 2, 3), (3,)], ids=str)
def test_a_class_has_one_colour_in_truth_and_labels_whatever_else_is_in_the_slice(tmp_path, values, there):
    scan_file(tmp_path / "scan.tif", SHAPE)
    image = str(ingest(str(tmp_path / "scan.tif"), str(tmp_path / "scan.zarr")).location)
    model = model_file(tmp_path / "m.safetensors", SETTINGS, class_values=(3, 9, 200))
    segment(plan_segment(image, model=model, name="x"), run=run_serial)
    classes = np.resize(there, SHAPE)
    np.save(tmp_path / "truth.npy", np.array(values, np.uint8)[classes])
    truth = ingest_labels(str(tmp_path / "truth.npy"), image=image, name="truth")
    labels = open_labels(f"{image}/labels/x")
    drawn = imagecodecs.png_decode(picture(open_image(image), labels, truth=truth)).astype(float)
    times = drawn.shape[0] // SHAPE[1]
    grey, over, found = (drawn[::times, ::times][:, at : at + SHAPE[2]] for at in (0, SHAPE[2] + 8, 2 * SHAPE[2] + 16))
    for panel, plane in ((over, classes[1]), (found, labels.array[1])):
        for number in range(4):  # the last is none of the model's
            shown = grey if number in (0, 3) else 0.55 * grey + 0.45 * np.array(colour_of(number))
            assert np.abs(panel - shown)[plane == number].max(initial=0) <= 1
