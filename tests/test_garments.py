"""The synthetic garments are what `data` promises: reproducible, balanced, and the same as ever."""

import functools

import matplotlib.path
import numpy as np
import pytest

from data import garments


@functools.cache
def drawn(split):
    return garments.draw(split)


@pytest.mark.parametrize(("split", "n"), [("train", 10_000), ("test", 2_000)])
def test_what_all_pictures_share(split, n):
    images, labels = drawn(split)
    assert (images.shape, images.dtype, labels.dtype) == ((n, 28, 28), np.uint8, np.int64)
    assert np.bincount(labels, minlength=10).tolist() == [n // 10] * 10
    # shuffled: a batch mixes the classes
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
    assert (images.max(axis=(1, 2)) > 60).all()  # none was left blank


def test_split_and_seed_decide_everything():
    draws = [("train", 60, 1), ("train", 60, 2), ("test", 60, 0), ("test", 60, 1), ("test", 60, 2)]
    images, labels = zip(*[garments.draw(*arguments) for arguments in draws], strict=True)
    assert len({image.tobytes() for image in np.concatenate(images)}) == 5 * 60
    assert len({order.tobytes() for order in labels}) == 5
    np.random.seed(1)  # noqa: NPY002  the global generator must not matter
    again, labels_again = garments.draw("test", 60, seed=2)
    assert images[-1].tobytes() == again.tobytes() and labels[-1].tobytes() == labels_again.tobytes()


# Statistics of each class's test images. Checkpoints were trained on such images: if you change how they are drawn,
# change these numbers too.
LOOKS = [
    [75.27, 47.38, 84.97, 48.80, 85.82, 28.40, 75.00, 45.72, 63.83, 70.54],  # the mean pixel
    [15.88, 7.70, 16.37, 11.42, 15.70, 17.02, 19.68, 16.66, 17.82, 15.51],  # mean difference from the pixel below
    [15.78, 21.10, 20.22, 16.78, 24.85, 12.27, 23.76, 8.27, 14.81, 13.31],  # and from the pixel to the right
    [-5.16, -3.09, 0.11, 3.93, 1.26, 5.75, -2.80, 10.29, 15.28, 15.27],  # the mean of pixel times row, -1 to 1
    [0.03, -0.12, 0.16, 0.06, 0.03, 4.17, -0.14, 4.67, 0.11, 12.73],  # and times column: toes point left
]


def test_the_pictures_are_what_they_were():
    images, labels = drawn("test")
    classes = np.stack([images[labels == label].astype(float) for label in range(10)])  # (10, 200, 28, 28)
    (below, right), place = (np.abs(np.diff(classes, axis=axis)) for axis in (2, 3)), np.linspace(-1, 1, 28)
    looks = [each.mean(axis=(1, 2, 3)) for each in (classes, below, right, classes * place[:, None], classes * place)]
    np.testing.assert_allclose(looks, LOOKS, rtol=0, atol=0.02)  # rounding moves a few pixels by one level


# The painter's one difficult function.
@pytest.mark.parametrize("reverse", [False, True])
def test_fill_agrees_with_counting_points_inside(reverse):
    rng = np.random.default_rng(0)
    angles = np.sort(rng.uniform(0, 2 * np.pi, (5, 9)), axis=1)
    radius = rng.uniform(4, 18, (5, 9))  # stars, with corners outside the picture
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
    twice = garments.fill(np.concatenate([box, box], axis=1))[0]  # twice around: no pixel is more than covered
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
