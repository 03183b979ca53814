"""The drawn garments are what `data` promises: reproducible, balanced, distinct, and each class what it is called."""

import functools

import matplotlib.path
import numpy as np
import pytest

from data import garments


@functools.cache
def drawn(split):
    return garments.draw(split)


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
def test_what_all_pictures_share(split, n):
    images, labels = drawn(split)
    assert (images.shape, images.dtype, labels.dtype) == ((n, 28, 28), np.uint8, np.int64)
    assert np.bincount(labels, minlength=10).tolist() == [n // 10] * 10
    # shuffled: the classes come in no order that a batch could notice
    assert len(set(labels[:100].tolist())) == 10 and np.mean(np.diff(labels) == 0) < 0.15
    # the background is black and garments are light
    assert not images[:, [0, 0, -1, -1], [0, -1, 0, -1]].any()
    lit = images > 20
    assert 0.2 < lit.mean() < 0.7  # Fashion-MNIST: 0.48
    assert 110 < images[lit].mean() < 190  # Fashion-MNIST: 160
    assert lit.mean(axis=(1, 2)).min() > 0.05


@pytest.mark.parametrize("n", [1, 3, 10, 37])
def test_any_number_of_pictures(n, monkeypatch):
    monkeypatch.setattr(garments, "CHUNK", 3)  # 37: in some classes one more than a chunk
    images, labels = garments.draw("train", n)
    assert images.shape == (n, 28, 28) and labels.shape == (n,)
    assert np.ptp(np.bincount(labels, minlength=10)) <= 1 and labels.max() < 10
    assert (images.max(axis=(1, 2)) > 60).all()  # no picture was left out


def test_split_and_seed_decide_everything():
    draws = [("train", 60, 1), ("train", 60, 2), ("test", 60, 0), ("test", 60, 1), ("test", 60, 2)]
    images, labels = zip(*[garments.draw(*arguments) for arguments in draws], strict=True)
    assert len({image.tobytes() for image in np.concatenate(images)}) == 5 * 60
    assert len({order.tobytes() for order in labels}) == 5
    np.random.seed(1)  # noqa: NPY002  the global generator must not matter
    again, labels_again = garments.draw("test", 60, seed=2)
    assert images[-1].tobytes() == again.tobytes() and labels[-1].tobytes() == labels_again.tobytes()


# Of the test pictures of each class. Somebody's checkpoint was trained on these pictures: whoever changes how they are
# drawn changes these numbers.
LOOKS = [
    [75.27, 47.38, 84.97, 48.80, 85.82, 28.40, 75.00, 45.72, 63.83, 70.54],  # the mean pixel
    [15.88, 7.70, 16.37, 11.42, 15.70, 17.02, 19.68, 16.66, 17.82, 15.51],  # its mean difference from the one below
    [15.78, 21.10, 20.22, 16.78, 24.85, 12.27, 23.76, 8.27, 14.81, 13.31],  # and to the right
]


def test_the_pictures_are_what_they_were():
    classes = np.stack([of_class(label) for label in range(10)])  # (10, 200, 28, 28)
    differences = classes, np.abs(np.diff(classes, axis=2)), np.abs(np.diff(classes, axis=3))
    looks = [difference.mean(axis=(1, 2, 3)) for difference in differences]
    np.testing.assert_allclose(looks, LOOKS, rtol=0, atol=0.02)  # rounding moves few pixels by one level


def test_no_two_pictures_are_alike():
    """And a test picture's nearest training picture is no copy of it with a little noise."""
    images = np.concatenate([drawn("train")[0], drawn("test")[0]])
    assert len({image.tobytes() for image in images}) == len(images) == 12_000
    train, test = vectors(images[:10_000:2]), vectors(images[10_000:10_200])
    squared = (train**2).sum(1) - 2 * test @ train.T + (test**2).sum(1)[:, None]
    assert np.sqrt(squared.min(axis=1)).min() > 0.5


def test_least_squares_tells_the_classes_apart():
    train, test = (np.c_[vectors(drawn(split)[0]), np.ones(len(drawn(split)[0]))] for split in ("train", "test"))
    weights = np.linalg.lstsq(train, np.eye(10)[drawn("train")[1]], rcond=None)[0]
    right = ((test @ weights).argmax(axis=1) == drawn("test")[1]).astype(float)
    assert (np.bincount(drawn("test")[1], right) > 0.9 * 200).all()


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
    waist = dresses[:, 10:13, 8:20].sum(axis=2).min(axis=1)
    assert np.mean(waist < dresses[:, 23].sum(axis=1)) > 0.9
    assert dresses[:, :, [0, 1, -2, -1]].mean() < 0.02


def test_coats_open_in_front_and_shirts_have_buttons():
    front = {label: of_class(label)[:, 16:24, 10:19] for label in (2, 4, 6)}
    dark = {label: strip[:, :, 3:6].min(axis=2) < 0.8 * np.median(strip, axis=2) for label, strip in front.items()}
    assert np.mean(dark[4].all(axis=1)) > 0.5  # a line (in a checked coat not everywhere)
    assert np.mean(dark[6].any(axis=1) & ~dark[6].all(axis=1)) > 0.8  # dots
    assert np.mean(dark[2].all(axis=1)) < 0.05


def test_toes_point_left_sneakers_are_low_and_boots_are_high():
    for label in (5, 7, 9):
        left, right = (lit(label)[:, :, columns].sum(axis=(1, 2)) for columns in (slice(2, 9), slice(19, 26)))
        assert np.mean(left < right) > 0.75, label
    assert not lit(7)[:, :7].any()
    assert np.mean(lit(9)[:, :10].any(axis=(1, 2))) > 0.95


def enclosed(pictures):
    """How many dark pixels of each picture (n, 28, 28) cannot be reached from outside."""
    dark = np.pad(~pictures, ((0, 0), (1, 1), (1, 1)), constant_values=True)
    reached = np.ones_like(dark)
    reached[:, 1:-1, 1:-1] = False
    for _ in range(60):  # steps: further than any way around a garment
        for axis in (1, 2):
            reached |= dark & (np.roll(reached, 1, axis) | np.roll(reached, -1, axis))
    return (dark & ~reached).sum(axis=(1, 2))


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
    expected = np.zeros((28, 28))
    expected[2:5, 3:8] = np.outer((1, 1, 0.5), (0.7, 1, 1, 1, 0.8))
    np.testing.assert_allclose(garments.fill(box)[0], expected, atol=1e-6)
    twice = garments.fill(np.concatenate([box, box], axis=1))[0]  # around it twice: no pixel is more than covered
    np.testing.assert_allclose(twice, np.minimum(2 * expected, 1), atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "error", "complaint"),
    [(split, ValueError, "train") for split in (("Train",), ("",), (None,), (0,), ("validation",))]
    + [(("train", n), ValueError, "at least 1") for n in (0, -1)]
    + [(("train", 2.5), TypeError, "float"), (("train", 10, -1), ValueError, "negative")],
)
def test_bad_values(arguments, error, complaint):
    with pytest.raises(error, match=complaint):
        garments.draw(*arguments)
