"""Results: the volume that a run makes of an image, labels or, by a network without classes, a prediction.

A name stands for one of them in an image, so that whoever names it need not say which.
"""

from __future__ import annotations

from dataclasses import replace

from pipeline.errors import StoreError
from pipeline.store.arrays import read_attributes
from pipeline.store.image import Image, open_image
from pipeline.store.labels import (
    Labels,
    check_same_run,
    create_labels,
    describe_labels,
    label_location,
    publish,
    published,
    read_labels,
)
from pipeline.store.location import Location
from pipeline.store.predictions import (
    Prediction,
    check_same_prediction,
    create_prediction,
    describe_prediction,
    prediction_location,
    publish_prediction,
    published_predictions,
    read_prediction,
)
from pipeline.store.pyramid import Downsampling

Result = Labels | Prediction


def check_same_result(result: Result) -> None:
    """Refuse to mix two runs in one volume, or two kinds of volumes under one name."""
    other = "predictions" if isinstance(result, Labels) else "labels"
    if read_attributes(taken := result.location.parent.parent / other / result.location.name):
        raise StoreError(
            f"a name stands for one volume of an image, got {result.location.name}, which names {taken}; choose "
            "another name or delete that"
        )
    if isinstance(result, Labels):
        check_same_run(result)
    else:
        check_same_prediction(result)


def create_result(image: Image, result: Result) -> None:
    """Make the arrays of a volume, or go on with the one that is there, if it is of the same run."""
    if isinstance(result, Labels):
        create_labels(image, result)
    else:
        create_prediction(result)


def publish_result(image: Image, result: Result) -> None:
    """List a complete volume in its image: the commit point."""
    if isinstance(result, Labels):
        publish(image, result)
    else:
        publish_prediction(image, result)


def mark_reported(image: Image, name: str) -> None:
    """Say in the volume of this name that nothing of it is due any more; see Labels.report_due."""
    result = open_result(image.location, name)
    if not result.report_due:
        return
    if isinstance(result, Labels):
        describe_labels(image, replace(result, report_due=False))
    else:
        describe_prediction(image, replace(result, report_due=False))


def is_published(result: Result) -> bool:
    """Whether the volume is complete."""
    names = published if isinstance(result, Labels) else published_predictions
    return result.location.name in names(result.location.parent)


def downsampling(result: Result) -> Downsampling:
    """Return how the volume's pyramid is made."""
    return Downsampling.MODE if isinstance(result, Labels) else Downsampling.MEAN


def read_result(image: Location, name: str) -> Result | None:
    """Return the volume of this name, complete or not; None where there is none."""
    return read_labels(label_location(image, name)) or read_prediction(prediction_location(image, name))


def open_result(image: Location, name: str) -> Result:
    """Return the complete volume of this name.

    Raises
    ------
    StoreError : there is none, or the run that makes it did not finish.
    """
    result = read_result(image, name)
    if result is None:
        open_image(image)  # says it if there is none
        have = [*published(image / "labels"), *published_predictions(image / "predictions")]
        raise StoreError(
            f"labels must exist, got none at {label_location(image, name)}; the image has: {', '.join(have) or 'none'}"
        )
    return complete(result)


def complete(result: Result) -> Result:
    """Return the volume, or refuse it while the run that makes it did not finish."""
    if not is_published(result):
        kind = "labels" if isinstance(result, Labels) else "a prediction"
        raise StoreError(
            f"{kind} must be complete, got an unfinished run at {result.location}; run the same command again"
        )
    return result
