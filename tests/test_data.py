"""The data sets: the official files, other people's, and everything that can be wrong with a file or a network."""

import gzip
import hashlib
import http.server
import os
import threading
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

import data
from data import fashion_mnist

OFFICIAL = os.environ.get("FASHION_MNIST_DIR")
needs_official = pytest.mark.skipif(not OFFICIAL, reason="FASHION_MNIST_DIR is not set")


def idx(array):
    """The bytes of an IDX file that holds a uint8 array."""
    return bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


@pytest.fixture
def digits(tmp_path, monkeypatch):
    """A folder of four well-formed files that are not Fashion-MNIST, with 4 classes and 12 × 8 pixels."""
    monkeypatch.delenv("FASHION_MNIST_DIR", raising=False)
    folder = tmp_path / "digits"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for split, n in (("train", 20), ("test", 8)):
        images, labels = fashion_mnist.FILES[split]
        array = generator.integers(0, 256, (n, 12, 8), np.uint8)
        (folder / f"{images}.gz").write_bytes(gzip.compress(idx(array)))
        (folder / labels).write_bytes(idx((np.arange(n) % 4).astype(np.uint8)))
    return folder


@needs_official
@pytest.mark.parametrize(("split", "n"), [("train", 60_000), ("test", 10_000)])
def test_the_official_files_are_recognised(split, n):
    images, labels, classes, name = data.load("fashion-mnist", split, OFFICIAL)
    assert images.shape == (n, 28, 28)
    assert images.dtype == np.uint8
    assert labels.dtype == np.int64
    assert np.bincount(labels).tolist() == [n // 10] * 10
    assert classes[9] == "Ankle boot"
    assert name == "Fashion-MNIST"
    # trousers are narrow and sneakers low: labels belong to their images
    lit = images > 50
    assert lit[labels == 1].any(axis=1).mean() < lit[labels == 4].any(axis=1).mean()
    assert lit[labels == 7].any(axis=2).mean() < lit[labels == 3].any(axis=2).mean()


@needs_official
def test_unpacked_official_files_are_official_too(tmp_path):
    for name in fashion_mnist.FILES["test"]:
        (tmp_path / name).write_bytes(gzip.decompress((Path(OFFICIAL) / f"{name}.gz").read_bytes()))
    assert data.load("fashion-mnist", "test", tmp_path).name == "Fashion-MNIST"


def test_the_environment_variable_names_the_folder(digits, monkeypatch):
    monkeypatch.setenv("FASHION_MNIST_DIR", str(digits))
    assert data.load("auto", "train").name == "digits"


def test_other_files_get_numbers_for_names(digits):
    dataset = data.load("fashion-mnist", "train", digits)
    assert dataset.classes == ("0", "1", "2", "3")
    assert dataset.name == "digits"
    assert dataset.images.shape == (20, 12, 8)
    assert dataset.labels.tolist() == [i % 4 for i in range(20)]
    assert data.load("fashion-mnist", "test", digits).classes == dataset.classes


def test_arrays_can_be_written_to(digits):
    data.load("fashion-mnist", "train", digits).images[:] = 0


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda content: content[:-1], "announces"),
        (lambda content: content + b"x", "announces"),
        (lambda content: content[:6], "not an IDX file"),
        (lambda content: b"", "nothing"),
        (lambda content: b"<html>404</html>", "not an IDX file"),
        (lambda content: idx(np.zeros(20, np.uint8)), "not an IDX file of uint8 images"),
        (lambda content: idx(np.zeros((0, 12, 8), np.uint8)), "announces"),
        (lambda content: idx(np.zeros((19, 12, 8), np.uint8)), "19 train images but 20 labels"),
        (lambda content: bytes((0, 0, 8, 3)) + b"\xff" * 12 + content[16:], "announces"),
        (lambda content: bytes((0, 0, 13, 3)) + content[4:], "not an IDX file"),
        (lambda content: gzip.compress(content)[:-9], "cannot be read"),
        (lambda content: gzip.compress(content)[:40] + b"\x00" * 40, "cannot be read"),
        (lambda content: b"\x1f\x8b garbage", "cannot be read"),
    ],
)
def test_a_damaged_file_is_one_clear_line(digits, damage, complaint):
    path = digits / "train-images-idx3-ubyte.gz"
    path.write_bytes(damage(gzip.decompress(path.read_bytes())))
    with pytest.raises(data.DataError, match=complaint) as caught:
        data.load("auto", "train", digits)
    assert "\n" not in str(caught.value)
    assert str(digits) in str(caught.value)


def test_every_truncation_is_noticed(digits):
    path = digits / "train-images-idx3-ubyte.gz"
    for content in (path.read_bytes(), gzip.decompress(path.read_bytes())):
        for length in range(0, len(content), 7):
            path.write_bytes(content[:length])
            with pytest.raises(data.DataError):
                data.load("fashion-mnist", "train", digits)


def test_a_gzip_bomb_is_not_unpacked(digits):
    """Zeros without end, almost, behind a header that announces little."""
    path = digits / "train-images-idx3-ubyte.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(idx(np.zeros((20, 12, 8), np.uint8)))
        for _ in range(8):
            file.write(bytes(1 << 25))
    tracemalloc.start()
    with pytest.raises(data.DataError, match="announces 20 × 12 × 8 bytes of data, but more follow"):
        data.load("fashion-mnist", "train", digits)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10e6


def test_swapped_files_are_noticed(digits):
    images, labels = digits / "train-images-idx3-ubyte.gz", digits / "train-labels-idx1-ubyte"
    image_bytes, label_bytes = images.read_bytes(), labels.read_bytes()
    images.write_bytes(label_bytes)
    labels.write_bytes(image_bytes)
    with pytest.raises(data.DataError, match="not an IDX file"):
        data.load("fashion-mnist", "train", digits)


def test_a_named_folder_must_hold_the_files(tmp_path):
    with pytest.raises(data.DataError, match="no train-images-idx3-ubyte"):
        data.load("auto", "train", tmp_path)


@pytest.mark.parametrize(("name", "split"), [("mnist", "train"), ("garments", "validation")])
def test_unknown_names_are_refused(name, split):
    with pytest.raises(ValueError, match="fashion-mnist"):
        data.load(name, split)


# Downloads, from hosts on this machine.
@pytest.fixture
def host(digits, tmp_path, monkeypatch):
    """Serve `digits` (both files gzipped) as if they were the official files; the cache is an empty folder."""
    labels = digits / "train-labels-idx1-ubyte"
    (digits / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels.read_bytes()))

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=digits)

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(fashion_mnist, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(fashion_mnist, "HOSTS", (f"http://127.0.0.1:{server.server_port}/",))
    sums = {}
    for name in fashion_mnist.FILES["train"]:
        packed = (digits / f"{name}.gz").read_bytes()
        sums[name] = (hashlib.sha256(packed).hexdigest(), hashlib.sha256(gzip.decompress(packed)).hexdigest())
    monkeypatch.setattr(fashion_mnist, "SHA256", sums)
    yield fashion_mnist.HOSTS[0]
    server.shutdown()
    server.server_close()


def test_a_download_is_checked_kept_and_not_repeated(host, monkeypatch):
    first = data.load("fashion-mnist", "train")
    assert first.name == "Fashion-MNIST"
    assert sorted(path.name for path in fashion_mnist.CACHE.iterdir()) == sorted(
        f"{name}.gz" for name in fashion_mnist.FILES["train"]
    )
    monkeypatch.setattr(fashion_mnist, "HOSTS", ())
    np.testing.assert_array_equal(data.load("fashion-mnist", "train").images, first.images)


def test_an_impostor_is_named_and_the_next_host_tried(host, digits, monkeypatch, capsys):
    true_name = "train-images-idx3-ubyte.gz"
    (digits / "impostor").mkdir()
    (digits / "impostor" / true_name).write_bytes(b"digits under the same name")
    monkeypatch.setattr(fashion_mnist, "HOSTS", (f"{host}impostor/", host))
    assert data.load("auto", "train").name == "Fashion-MNIST"
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "impostor/train-images" in line]
    assert fashion_mnist.SHA256["train-images-idx3-ubyte"][0] in line
    assert hashlib.sha256(b"digits under the same name").hexdigest() in line


def test_nothing_wrong_stays_in_the_cache(host, monkeypatch):
    monkeypatch.setattr(fashion_mnist, "SHA256", dict.fromkeys(fashion_mnist.SHA256, ("0" * 64,) * 2))
    with pytest.raises(data.DataError, match="expected SHA-256 0000"):
        data.load("fashion-mnist", "train")
    assert list(fashion_mnist.CACHE.iterdir()) == []


def test_without_a_network_garments_take_its_place(monkeypatch, tmp_path, capsys):
    monkeypatch.delenv("FASHION_MNIST_DIR", raising=False)
    monkeypatch.setattr(fashion_mnist, "CACHE", tmp_path)
    monkeypatch.setattr(fashion_mnist, "HOSTS", ("http://127.0.0.1:9/",))
    assert data.load("auto", "test").name == "garments"
    assert "garments take its place" in capsys.readouterr().out
    with pytest.raises(data.DataError, match="could not be downloaded"):
        data.load("fashion-mnist", "test")
