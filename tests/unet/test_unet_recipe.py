import pytest

from pipeline.errors import ArgumentError
from pipeline.unet.recipe import Recipe, Schedule, choose_dims, load_recipe
from pipeline.unet.settings import Padding, UNetSettings


def written(tmp_path, text):
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    return path


def test_a_recipe_is_read_from_toml_and_the_rest_is_default(tmp_path):
    text = 'padding = "valid"\nschedule = "constant"\ndepth = 2\nlearning_rate = 1\nbatch_norm = false'
    expected = Recipe(padding=Padding.VALID, schedule=Schedule.CONSTANT, depth=2, learning_rate=1.0, batch_norm=False)
    assert load_recipe(written(tmp_path, text)) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("colour = 3", "got .'colour'."), ("depth = 2.5", "depth must be of type int, got 2.5"),
        ("batch_norm = 1", "batch_norm must be of type bool"), ("depth = true", "depth must be of type int"),
        ('padding = "mirror"', "padding must be one of valid, same"), ("steps = 0", "steps must be at least 1"),
        ("validation_fraction = 1.0", "between 0 and 1"), ("learning_rate = -1", "learning_rate must be above 0"),
        ("learning_rate = inf", "learning_rate must be above 0"), ("dims = 1", "dims must be 2 or 3, or 0"),
        ("classes = [1, 2]", "classes must be a list of texts"),
        ("depth = ", "must be a TOML file"), ("contrast = -0.5", "contrast must be at least 0"),
    ],
)
def test_settings_that_are_unknown_or_break_a_rule_are_refused(tmp_path, text, message):
    with pytest.raises(ArgumentError, match=message) as caught:
        load_recipe(written(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_a_missing_recipe_is_refused(tmp_path):
    with pytest.raises(ArgumentError, match=r"must be a TOML file, got .*none.toml"):
        load_recipe(tmp_path / "none.toml")


@pytest.mark.parametrize(
    ("dims", "shape", "size", "expected"),
    [
        (0, (500, 500), None, 2), (0, (500, 500), (0.5, 0.5), 2), (0, (16, 64, 64), None, 3),
        (0, (15, 64, 64), None, 2), (0, (99, 64, 64), (3.0, 1.0, 1.0), 3), (0, (99, 64, 64), (3.1, 1.0, 1.0), 2),
        (2, (99, 64, 64), None, 2), (3, (4, 64, 64), (9.0, 1.0, 1.0), 3),
    ],
)  # fmt: skip
def test_dims_follow_from_the_images(dims, shape, size, expected):
    assert choose_dims(Recipe(dims=dims), shapes=[shape], voxel_size_um=size) == expected


def test_a_3d_network_on_slides_is_refused():
    with pytest.raises(ArgumentError, match="3-D network needs volumes"):
        choose_dims(Recipe(dims=3), shapes=[(64, 64)], voxel_size_um=None)


def test_the_thinnest_volume_decides():
    assert choose_dims(Recipe(), shapes=[(64, 64, 64), (8, 64, 64)], voxel_size_um=None) == 2


def test_patches_are_multiples_of_the_stride():
    settings = UNetSettings(dims=2, depth=3)
    assert Recipe().patch_core(settings) == 128
    with pytest.raises(ArgumentError, match="multiple of the stride 8, got 100; use 104"):
        Recipe(patch=100).patch_core(settings)
