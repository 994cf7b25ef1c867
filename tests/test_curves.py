"""The picture of learning curves, read back pixel by pixel."""

import json

import imagecodecs
import numpy as np
import pytest
from volumes import model_file, scan_file

from pipeline.compute.runner import run_serial
from pipeline.curves import CurvesFile, draw_curves, nice_step
from pipeline.ingest import ingest
from pipeline.plan import plan_segment
from pipeline.preview import draw_sample
from pipeline.segment import segment
from pipeline.unet.settings import Padding, UNetSettings
from pipeline.unet.training.course import Validation
from pipeline.unet.training.validation import Sample

HELD_OUT, TRAINING, FIRST_CLASS = (0, 114, 178), (213, 94, 0), (148, 103, 60)
PANELS = slice(48, 296), slice(336, 584)  # rows of losses and of Dice
PLOT = slice(77, 728)


def drawn(curve, classes=("a", "b")):
    return imagecodecs.png_decode(draw_curves(curve, title="m", classes=classes)).astype(int)


def places(picture, colour, rows):
    """Return where a curve of this colour is, (row, column) from the panel's corner."""
    return np.argwhere((np.abs(picture[rows, PLOT, :3] - colour) < 40).all(-1))


def course(train=0.8, held_out=0.4, dice=(0.75, 0.25), best=3):
    return [Validation(10 * n, train, held_out + 0.01 * abs(n - best), dice) for n in range(1, 6)]


def test_heights_are_values_counted_from_zero():
    picture = drawn(course())
    floor = PANELS[0].stop - PANELS[0].start
    (train,), (held_out,) = ({np.median(places(picture, c, PANELS[0])[:, 0])} for c in (TRAINING, HELD_OUT))
    assert (floor - held_out) / (floor - train) == pytest.approx(0.4 / 0.8, abs=0.03)
    dice = np.median(places(picture, FIRST_CLASS, PANELS[1])[:, 0])
    assert 1 - dice / floor == pytest.approx(0.75, abs=0.02)


def test_a_class_has_one_colour_in_curves_pictures_and_viewers(tmp_path):
    scan_file(tmp_path / "scan.tif", (16, 16))
    image = ingest(str(tmp_path / "scan.tif"), str(tmp_path / "scan.zarr"))
    settings = UNetSettings(dims=2, width=2, depth=1, padding=Padding.SAME, n_convs=1, n_classes=10)
    model = model_file(tmp_path / "m.safetensors", settings)
    done = segment(plan_segment(str(image.location), model=model, name="x"), run=run_serial)
    shown = json.loads((done.result.location / "zarr.json").read_bytes())["attributes"]["ome"]["image-label"]["colors"]
    rgba = {each["label-value"]: each["rgba"] for each in shown}
    assert [value for value, (*_, opacity) in rgba.items() if opacity == 0] == [0]
    assert rgba[8] == rgba[1]
    truth = np.arange(8).repeat(32).reshape(16, 16)
    picture = imagecodecs.png_decode(draw_sample(Sample(np.zeros((16, 16), np.float32), truth, truth)))
    seen = picture[:: picture.shape[0] // 16][:16]
    curves = drawn([Validation(n, 1.0, 1.0, tuple(np.arange(1, 9) / 10)) for n in (1, 2)], classes=tuple("abcdefgh"))
    for value in range(1, 8):
        (mixed,) = {tuple(row) for row in seen[2 * value, picture.shape[1] // 2 - 20 : picture.shape[1] // 2 + 20]}
        colour = np.array(rgba[value][:3])
        assert np.corrcoef(mixed, colour)[0, 1] > 0.999
        heights = places(curves, colour * 4 // 5, PANELS[1])[:, 0]
        assert 1 - np.median(heights) / (PANELS[1].stop - PANELS[1].start) == pytest.approx((value + 1) / 10, abs=0.02)


def test_losses_that_span_decades_fall_on_a_straight_line():
    curve = [Validation(n, 10.0**-n, 10.0**-n, (0.5, 0.5)) for n in range(1, 5)]
    spots = places(drawn(curve), HELD_OUT, PANELS[0])
    row, column = spots.T
    assert np.abs(row - np.polyval(np.polyfit(column, row, 1), column)).max() < 8


def test_of_values_the_ratio_is_drawn_from_zero_db():
    curve = [Validation(n, 1.0, 1.0 - 0.1 * n, (), 40.0 if n == 1 else 20.0) for n in range(1, 7)]
    picture, floor = drawn(curve, classes=()), PANELS[1].stop - PANELS[1].start
    spots = places(picture, HELD_OUT, PANELS[1])
    heights = [floor - np.median(spots[at, 0]) for at in (spots[:, 1] > 300, spots[:, 1] < 112)]
    assert heights[0] / floor == pytest.approx(20 / (40 * 1.06), abs=0.02)
    assert heights[1] > heights[0]
    same = [Validation(1, 1.0, 1.0, (), None)]
    assert len(places(drawn(same, classes=()), HELD_OUT, PANELS[0]))


@pytest.mark.parametrize("best", [1, 3, 5])
def test_the_best_step_is_marked_where_it_lies(best):
    panel = drawn(course(best=best))[PANELS[1], PLOT.start : PLOT.stop + 4]
    darkness = np.where(np.ptp(panel, axis=-1) < 5, 255 - panel[..., 0], 0).sum(0)
    marked = np.convolve(darkness, (1, 1), "valid").argmax()  # a line may share two columns
    assert marked / (PLOT.stop - PLOT.start) == pytest.approx(best / 5, abs=0.01)


def test_a_class_without_dice_leaves_a_gap_and_many_classes_become_two_lines():
    curve = [Validation(n, 1.0, 1.0 - 0.1 * n, (None if n in (3, 4) else 0.5, None)) for n in range(1, 7)]
    columns = set(places(drawn(curve), FIRST_CLASS, PANELS[1])[:, 1])
    assert not columns & set(range(230, 530))  # from step 2, at a third, to step 5
    assert columns & set(range(120, 210))
    many = [Validation(n, 1.0, 1.0, (0.2, *(0.8,) * 8)) for n in (1, 2)]
    picture, floor = drawn(many, classes=tuple("abcdefghi")), PANELS[1].stop - PANELS[1].start
    mean, worst = (1 - np.median(places(picture, c, PANELS[1])[:, 0]) / floor for c in (HELD_OUT, TRAINING))
    assert (mean, worst) == (pytest.approx(6.6 / 9, abs=0.02), pytest.approx(0.2, abs=0.02))


def test_a_single_validation_is_a_picture_and_its_file_is_written_at_once(tmp_path, monkeypatch):
    file = CurvesFile(str(tmp_path / "m.curves.png"), "m", ("a", "b"))
    file.put(course()[0])
    first = (tmp_path / "m.curves.png").read_bytes()
    assert imagecodecs.png_decode(first).shape == (640, 960, 3)
    file.put(course()[1])  # too soon after
    assert (tmp_path / "m.curves.png").read_bytes() == first
    file.write()
    assert (tmp_path / "m.curves.png").read_bytes() != first
    assert [each.name for each in tmp_path.iterdir()] == ["m.curves.png"]


@pytest.mark.parametrize(("least", "step"), [(0.11, 0.2), (0.2, 0.2), (3, 5), (7, 10), (50, 50), (0.0051, 0.01)])
def test_steps_are_round(least, step):
    assert nice_step(least) == pytest.approx(step)
