"""The drawn garments are what `data` promises: reproducible, balanced, distinct, and each class what it is called."""

import functools

import matplotlib.path
import numpy as np
import pytest

from data import garments


@functools.cache
def drawn(split):
    return garments.draw(split)


def all_images():
    return np.concatenate([drawn("train")[0], drawn("test")[0]])


def of_class(label):
    """The test pictures (200, 28, 28) of one class."""
    images, labels = drawn("test")
    return images[labels == label].astype(float)


def lit(label):
    """Where they are not background, bool."""
    return of_class(label) > 20


def vectors(images):
    """(n, 784), 0 to 1."""
    return images.reshape(len(images), -1) / 255


@pytest.mark.parametrize(("split", "n"), [("train", 10_000), ("test", 2_000)])
def test_shapes_types_and_balance(split, n):
    images, labels = drawn(split)
    assert images.shape == (n, 28, 28) and images.dtype == np.uint8
    assert labels.shape == (n,) and labels.dtype == np.int64
    assert np.bincount(labels, minlength=10).tolist() == [n // 10] * 10
    # shuffled: the classes come in no order that a batch could notice
    assert len(set(labels[:100].tolist())) == 10 and np.mean(np.diff(labels) == 0) < 0.15


@pytest.mark.parametrize("n", [1, 3, 10, 37, 2503])
def test_any_number_of_pictures(n):
    images, labels = garments.draw("train", n)
    assert images.shape == (n, 28, 28) and labels.shape == (n,)
    count = np.bincount(labels, minlength=10)
    assert len(count) == 10 and count.max() - count.min() <= 1
    assert (images.max(axis=(1, 2)) > 60).all()  # no picture was left out


def test_the_same_seed_gives_the_same_bytes():
    images, labels = garments.draw("train", 200, seed=5)
    np.random.seed(1)  # noqa: NPY002  the global generator must not matter
    again, labels_again = garments.draw("train", 200, seed=5)
    assert images.tobytes() == again.tobytes() and labels.tobytes() == labels_again.tobytes()


@pytest.mark.parametrize("other", [("train", 300, 2), ("test", 300, 0), ("test", 300, 1), ("test", 300, 2)])
def test_another_seed_or_split_gives_others(other):
    images, labels = garments.draw("train", 300, seed=1)
    other_images, other_labels = garments.draw(*other)
    assert not {image.tobytes() for image in images} & {image.tobytes() for image in other_images}
    assert (labels != other_labels).any()


# Of the test pictures of each class: the mean pixel, and its mean difference from the one below and the one to the
# right. Somebody's checkpoint was trained on these pictures: whoever changes how they are drawn changes these numbers.
LOOKS = (
    (75.27, 15.88, 15.78),
    (47.38, 7.70, 21.10),
    (84.97, 16.37, 20.22),
    (48.80, 11.42, 16.78),
    (85.82, 15.70, 24.85),
    (28.40, 17.02, 12.27),
    (75.00, 19.68, 23.76),
    (45.72, 16.66, 8.27),
    (63.83, 17.82, 14.81),
    (70.54, 15.51, 13.31),
)


@pytest.mark.parametrize("label", range(10))
def test_the_pictures_are_what_they_were(label):
    images = of_class(label)
    looks = images.mean(), np.abs(np.diff(images, axis=1)).mean(), np.abs(np.diff(images, axis=2)).mean()
    np.testing.assert_allclose(looks, LOOKS[label], rtol=0, atol=0.02)  # rounding moves few pixels by one level


def test_no_two_pictures_are_alike():
    images = all_images()
    assert len({image.tobytes() for image in images}) == len(images) == 12_000


def test_near_duplicates_are_rare():
    """A test picture's nearest training picture is no copy of it with a little noise."""
    train, test = vectors(drawn("train")[0][::2]), vectors(drawn("test")[0][:200])
    squared = (train**2).sum(1) - 2 * test @ train.T + (test**2).sum(1)[:, None]
    assert np.sqrt(squared.min(axis=1)).min() > 0.5


def test_background_is_black_and_garments_are_light():
    images = all_images()
    assert not images[:, [0, 0, -1, -1], [0, -1, 0, -1]].any()
    lit = images > 20
    assert 0.2 < lit.mean() < 0.7  # Fashion-MNIST: 0.48
    assert 110 < images[lit].mean() < 190  # Fashion-MNIST: 160
    assert lit.mean(axis=(1, 2)).min() > 0.05


def test_least_squares_tells_the_classes_apart():
    train, test = (np.c_[vectors(drawn(split)[0]), np.ones(len(drawn(split)[0]))] for split in ("train", "test"))
    weights = np.linalg.lstsq(train, np.eye(10)[drawn("train")[1]], rcond=None)[0]
    labels = drawn("test")[1]
    right = (test @ weights).argmax(axis=1) == labels
    assert min(right[labels == label].mean() for label in range(10)) > 0.9


@pytest.mark.parametrize("label", range(10))
def test_pictures_of_a_class_differ(label):
    images = of_class(label)
    distance = np.linalg.norm(vectors(images)[:100, None] - vectors(images)[None, 100:], axis=-1)
    assert distance.mean() > 4 and distance.min() > 1  # an all-white picture has norm 28
    size = lit(label).sum(axis=(1, 2))
    brightness = images.sum(axis=(1, 2)) / size
    assert size.std() > 0.06 * size.mean()
    assert brightness.std() > 0.12 * brightness.mean()


# Each class is what it is called: its shape, in pixels lit or not.


def test_sleeves_are_long_or_short():
    for label, long in ((0, 0), (2, 1), (4, 1)):
        sleeves = lit(label)[:, 16:19, [4, 5, 22, 23]].any(axis=(1, 2))
        assert np.mean(sleeves == long) > 0.9, label


def test_trousers_have_two_legs():
    legs = lit(1)[:, 16]
    assert np.mean(~legs[:, 13:15].all(axis=1) & legs[:, :13].any(axis=1) & legs[:, 15:].any(axis=1)) > 0.9


def test_dresses_are_narrow_at_the_waist_and_wide_below():
    dresses = lit(3)
    middle = dresses[:, :, 8:20].sum(axis=2)
    assert np.mean(middle[:, 10:13].min(axis=1) < dresses[:, 23].sum(axis=1)) > 0.9
    assert dresses[:, :, [0, 1, -2, -1]].mean() < 0.02


def test_coats_open_in_front_and_shirts_have_buttons():
    front = {label: of_class(label)[:, 16:24, 10:19] for label in (2, 4, 6)}
    dark = {label: strip[:, :, 3:6].min(axis=2) < 0.8 * np.median(strip, axis=2) for label, strip in front.items()}
    assert np.mean(dark[4].all(axis=1)) > 0.5  # a line (in a checked coat not everywhere)
    assert np.mean(dark[6].any(axis=1) & ~dark[6].all(axis=1)) > 0.8  # dots
    assert np.mean(dark[2].all(axis=1)) < 0.05


@pytest.mark.parametrize("label", [5, 7, 9])
def test_toes_point_left(label):
    shoes = lit(label)
    height = shoes.sum(axis=1)  # of each column
    assert np.mean(height[:, 2:9].sum(axis=1) < height[:, 19:26].sum(axis=1)) > 0.75


def test_sneakers_are_low_and_boots_are_high():
    assert not lit(7)[:, :7].any()
    assert np.mean(lit(9)[:, :10].any(axis=(1, 2))) > 0.95


def enclosed(pictures):
    """How many dark pixels of each picture (n, 28, 28) cannot be reached from its border."""
    reached = np.zeros_like(pictures)
    reached[:, [0, -1]] = reached[:, :, [0, -1]] = True
    for _ in range(60):  # steps: further than any way around a garment
        wider = reached.copy()
        wider[:, 1:] |= reached[:, :-1]
        wider[:, :-1] |= reached[:, 1:]
        wider[:, :, 1:] |= reached[:, :, :-1]
        wider[:, :, :-1] |= reached[:, :, 1:]
        reached = wider & ~pictures
    return (~pictures & ~reached).sum(axis=(1, 2))


def test_handles_and_straps_can_be_seen_through():
    assert np.mean(enclosed(lit(8)) >= 4) > 0.95
    assert np.mean(enclosed(lit(5)) >= 2) > 0.8
    assert np.mean(enclosed(lit(7)) == 0) > 0.95


# The painter's one difficult function.


@pytest.mark.parametrize("reverse", [False, True])
def test_fill_agrees_with_counting_points_inside(reverse):
    rng = np.random.default_rng(0)
    angles = np.sort(rng.uniform(0, 2 * np.pi, (5, 9)), axis=1)
    radius = rng.uniform(4, 18, (5, 9))  # stars, with corners outside of the picture
    stars = 14 + radius[..., None] * np.stack([np.cos(angles), np.sin(angles)], axis=-1)
    coverage = garments.fill(stars[:, ::-1] if reverse else stars)
    fine = (np.arange(28 * 16) + 0.5) / 16
    grid = np.stack(np.meshgrid(fine, fine), axis=-1).reshape(-1, 2)
    for star, pixels in zip(stars, coverage, strict=True):
        inside = matplotlib.path.Path(star).contains_points(grid).reshape(28, 16, 28, 16)
        difference = np.abs(pixels - inside.mean(axis=(1, 3)))
        assert difference.max() < 0.13 and difference.mean() < 0.002


def test_fill_is_exact_along_a_row():
    box = np.array([[[3.3, 2.0], [7.8, 2.0], [7.8, 4.5], [3.3, 4.5]]])
    row = np.zeros(28)
    row[3:8] = 0.7, 1, 1, 1, 0.8
    expected = np.zeros((28, 28))
    expected[2:4], expected[4] = row, row / 2
    np.testing.assert_allclose(garments.fill(box)[0], expected, atol=1e-6)


@pytest.mark.parametrize("split", ["Train", "", None, 0, "validation"])
def test_unknown_split(split):
    with pytest.raises(ValueError, match="train"):
        garments.draw(split)


@pytest.mark.parametrize("n", [0, -1])
def test_too_few(n):
    with pytest.raises(ValueError, match="at least 1"):
        garments.draw("train", n)


def test_other_bad_values():
    with pytest.raises(TypeError):
        garments.draw("train", 2.5)
    with pytest.raises(ValueError):
        garments.draw("train", 10, seed=-1)
