import pytest

from pipeline.errors import ArgumentError
from pipeline.store.scaling import Scaling
from pipeline.store.statistics import Normalisation
from pipeline.unet.settings import Block, Down, Family, Head, Padding, UNetSettings, closed_form_rule
from pipeline.unet.training.augment import Augmentation
from pipeline.unet.training.dims import choose_dims
from pipeline.unet.training.learner import training_rule
from pipeline.unet.training.losses import Loss
from pipeline.unet.training.recipe import Optimiser, Recipe, Schedule, load_recipe, shipped


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
        ("augmentation = 3", r"augmentation must be a table, got 3 .* write \[augmentation\]"),
        ("[augmentation]\ncolour = 1", r"\[augmentation\] in .* has the settings flips, .*, got .'colour'."),
        ("[augmentation]\nflips = 1", "flips must be of type bool, got 1"),
        ("[augmentation]\nelastic_nodes = 2.5", "elastic_nodes must be of type int, got 2.5"),
        ("[augmentation]\naugmentation = 1", "got .'augmentation'."),
        ("[loss]\nname = 1", "loss must be one of cross_entropy, dice, "),
        ("contrast = 0.2", r"got .'contrast'.; put contrast below \[augmentation\]"),
        ("[augmentation]\nsteps = 3", r"got .'steps'.; put steps above \[augmentation\]"),
        ('loss = "l3"', "one of cross_entropy, dice, dice_cross_entropy, binary_cross_entropy, dice_binary_cross_en"),
        ('optimiser = "lion"', "optimiser must be one of adamw, sgd"),
        ('schedule = "step"', "schedule must be one of constant, cosine, poly, plateau"),
        ("momentum = 1", "momentum must be at least 0 and below 1, got 1.0; use 0.99"),
        ("ema = 1", "ema must be at least 0 and below 1, got 1.0; use 0.99"),
        ("patience = -1", "patience must be at least 0, got -1"), ("patience = 0.5", "patience must be of type int"),
        ("plateau_patience = 0", "plateau_patience must be at least 1, got 0; use 1 or more"),
        ("foreground_share = 1.1", "foreground_share must be from 0 to 1, got 1.1; use 0.33"),
        ("foreground_share = nan", "foreground_share must be from 0 to 1, got nan"),
        ("clip_norm = -1", "clip_norm must be at least 0"), ("warm_up_steps = -1", "warm_up_steps must be at least 0"),
        ("weight_decay = nan", "weight_decay must be at least 0, got nan"),
        ("border_sigma_voxels = 0", "border_sigma_voxels must be above 0, got 0.0; use 5"),
        ("border_weight = 10", "border_weight needs labels that are instances, got 10 and instances = false"),
        ('border_weight = 10\ninstances = true\nloss = "dice"', "a sum over voxels, got loss dice; use dice_cross"),
        ('balance_classes = true\nloss = "dice"', "balance_classes need a loss that is a sum over voxels"),
        ("ignore = 1.5", "ignore must be of type int, got 1.5"),
        ("ignore = 0\ninstances = true", "ignore must be another value than the background"),
        ('normalisation = "window"', "needs its limits in the image's units, got none; set window"),
        ("window = [1, 2]", "window needs normalisation = window, got zscore; set that, or leave window out"),
        ('normalisation = "window"\nwindow = [1, 2, 3]', r"two numbers, the lower one first, got \(1.0, 2.0, 3"),
        ('normalisation = "window"\nwindow = [1, "2"]', "each window must be a list of numbers, got .1, '2'."),
        ("percentiles = [1, 99]", "percentiles needs normalisation = percentile, got zscore"),
        ("voxel_size_um = 0.5", "voxel_size_um must be a list of numbers, got 0.5"),
        ("voxel_size_um = [1, 0]", r"two or three lengths above 0, got \(1.0, 0.0\); give y and x, or z, y and x"),
        ("voxel_size_um = [1]", "voxel_size_um must be two or three lengths"),
        ("depth = ", "or a TOML file"),
        ("poolings = 2", r"poolings must be a list of lists such as \[\[1, 2, 2\], .*, got 2"),
        ("poolings = [[1, 2.0, 2]]", r"poolings must be a list of lists"),
        ('family = "resnet"', "unet, unet.., fcn, got"),
        ("[augmentation]\ncontrast = -0.5", "contrast must be from 0 to 1, got -0.5"),
        ("neighbours = -1", "neighbours must be at least 0, got -1"), ("neighbours = 1.0", "must be of type int"),
        ("neighbours = 2\ndims = 3", "neighbours need a 2-D network, got 2 for a 3-D one, which sees them without"),
        ("neighbours = 1\npoolings = [[1, 2, 2]]", "neighbours need a 2-D network, got 1 for a 3-D one"),
    ],
)
def test_settings_that_are_unknown_or_break_a_rule_are_refused(tmp_path, text, message):
    with pytest.raises(ArgumentError, match=message) as caught:
        load_recipe(written(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_the_papers_settings_are_read(tmp_path):
    text = """
        loss = "cross_entropy"
        instances = true
        border_weight = 10
        ignore = 255
        optimiser = "sgd"
        learning_rate = 0.01
        [augmentation]
        elastic_sigma_voxels = 10
        flips = false
    """
    change = Augmentation(elastic_sigma_voxels=10.0, flips=False)
    assert load_recipe(written(tmp_path, text)) == Recipe(
        loss=Loss.CROSS_ENTROPY, instances=True, border_weight=10.0, ignore=255, optimiser=Optimiser.SGD,
        learning_rate=0.01, augmentation=change,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('normalisation = "window"\nwindow = [-160, 240]', Scaling(Normalisation.WINDOW, ((-160.0, 240.0),))),
        (
            'normalisation = "window"\nwindow = [[-160, 240], [0, 0.5]]',
            Scaling(Normalisation.WINDOW, ((-160.0, 240.0), (0.0, 0.5))),
        ),
        (
            'normalisation = "percentile"\npercentiles = [0.5, 99.5]',
            Scaling(Normalisation.PERCENTILE, ((0.5, 99.5),)),
        ),
        ('normalisation = "dtype"\nvoxel_size_um = [5, 0.5]', Scaling(Normalisation.DTYPE)),
    ],
)
def test_the_scale_of_intensities_is_read(tmp_path, text, expected):
    recipe = load_recipe(written(tmp_path, text))
    assert recipe.scaling == expected
    assert recipe.voxel_size_um == ((5.0, 0.5) if "voxel" in text else ())


@pytest.mark.parametrize("loss", [Loss.BINARY_CROSS_ENTROPY, Loss.DICE_BINARY_CROSS_ENTROPY])
def test_a_sigmoid_has_no_channel_for_the_first_class(loss):
    settings = Recipe(loss=loss).network(dims=2, in_channels=1, n_classes=4)
    assert (settings.head, settings.n_classes, settings.n_labels) == (Head.SIGMOID, 3, 4)
    assert Recipe().network(dims=2, in_channels=1, n_classes=4).n_classes == 4


def test_a_missing_recipe_is_refused(tmp_path):
    with pytest.raises(ArgumentError, match=r"one of .*membrane2d.* or a TOML file, got .*none.toml"):
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


DESCRIBED = (shipped()["unet2015"].parent / "README.md").read_text()


@pytest.mark.parametrize("name", shipped())
def test_every_recipe_that_ships_is_legal_and_described(name):
    recipe = load_recipe(name)
    for dims in [recipe.dims] if recipe.dims else [2, 3]:
        settings = recipe.network(dims=dims, in_channels=1, n_classes=2)
        tile = training_rule(settings).tile_shape((recipe.patch_core(settings),) * dims)
        recipe.augmentation.check(tile, spacing=(1.0,) * dims)
    assert f"| `{name}` |" in DESCRIBED
    assert shipped()[name].read_text().startswith("# ")


def test_unet2015_is_the_network_and_the_tile_of_the_paper():
    recipe = load_recipe("unet2015")
    settings = recipe.network(dims=2, in_channels=1, n_classes=2)
    rule = closed_form_rule(settings)
    assert rule.tile_shape((recipe.patch_core(settings),) * 2) == (572, 572)
    assert 572 - 2 * (rule.halo[0] - rule.trim[0]) == 388
    assert (settings.width, settings.depth, settings.stride, recipe.batch, recipe.momentum) == (64, 4, 16, 1, 0.99)
    assert (recipe.border_weight, recipe.border_sigma_voxels, recipe.augmentation.elastic_sigma_voxels) == (10, 5, 10)


def test_thick_slices_decide_depth_dimensions_and_the_shape_of_patches(tmp_path):
    recipe = load_recipe(written(tmp_path, "poolings = [[1, 2, 2], [1, 2, 2], [2, 2, 2], [2, 2, 2]]\nkernel = 5"))
    assert choose_dims(recipe, shapes=[(20, 256, 256)], voxel_size_um=(6.0, 1.0, 1.0)) == 3
    settings = recipe.network(dims=3, in_channels=1, n_classes=2)
    assert (settings.depth, settings.strides, settings.stride) == (4, (4, 16, 16), 16)
    assert settings.reaches(0) == (0, 0, 2, 2, 2)
    assert settings.reaches(1) == (2,) * 5
    assert settings.in_proportion(recipe.patch_core(settings)) == (12, 48, 48)
    with pytest.raises(ArgumentError, match="a 3-D network needs volumes, got images of shape"):
        choose_dims(recipe, shapes=[(256, 256)], voxel_size_um=None)


def test_neighbours_make_a_2d_network_of_more_channels(tmp_path):
    recipe = load_recipe(written(tmp_path, "neighbours = 2"))
    assert choose_dims(recipe, shapes=[(64, 64, 64)], voxel_size_um=None) == 2  # 3 without
    settings = recipe.network(dims=2, in_channels=3, n_classes=2)
    assert (settings.neighbours, settings.in_channels, settings.image_channels) == (2, 15, 3)
    with pytest.raises(ArgumentError, match=r"neighbours are slices of volumes, got images of shape \(64, 64\); leave"):
        choose_dims(recipe, shapes=[(64, 64)], voxel_size_um=None)


def test_the_family_is_read(tmp_path):
    text = 'family = "unet++"\ndeep_supervision = true\nblock = "residual"\ndown = "strided"'
    settings = load_recipe(written(tmp_path, text)).network(dims=2, in_channels=1, n_classes=2)
    assert (settings.family, settings.block, settings.down) == (Family.NESTED, Block.RESIDUAL, Down.STRIDED)
    assert (settings.deep_supervision, settings.attention) == (True, False)
