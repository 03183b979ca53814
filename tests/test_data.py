"""The data sets: the official files, other people's, and what can go wrong with a file or a download."""

import contextlib
import functools
import gzip
import hashlib
import http.server
import itertools
import os
import socketserver
import threading
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data
from data import fashion_mnist, garments, pictures

OFFICIAL = os.environ.get("FASHION_MNIST_DIR")
needs_official = pytest.mark.skipif(not OFFICIAL, reason="FASHION_MNIST_DIR is not set")
TRAIN_IMAGES = "train-images-idx3-ubyte.gz"


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
    found = data.load("fashion-mnist", split, OFFICIAL)
    images, labels = found.images, found.labels
    assert (images.shape, images.dtype, labels.dtype) == ((n, 28, 28), np.uint8, np.int64)
    assert np.bincount(labels).tolist() == [n // 10] * 10
    assert (found.classes[9], found.name) == ("Ankle boot", "Fashion-MNIST")
    # the labels match the images: trousers are narrow, sneakers low
    lit = images > 50
    assert lit[labels == 1].any(axis=1).mean() < lit[labels == 4].any(axis=1).mean()
    assert lit[labels == 7].any(axis=2).mean() < lit[labels == 3].any(axis=2).mean()


@needs_official
@pytest.mark.parametrize("name", fashion_mnist.SHA256)
def test_the_checksums_are_those_of_the_official_files(name):
    packed = (Path(OFFICIAL) / f"{name}.gz").read_bytes()
    assert fashion_mnist.SHA256[name] == tuple(hashlib.sha256(x).hexdigest() for x in (packed, gzip.decompress(packed)))


def test_downloads_are_kept_in_the_project_wherever_a_script_is_run():
    assert Path(__file__).parent.parent / "data" / "fashion_mnist" == fashion_mnist.CACHES[0]


@needs_official
def test_unpacked_official_files_are_official_too(tmp_path):
    for name in fashion_mnist.FILES["test"]:
        (tmp_path / name).write_bytes(gzip.decompress((Path(OFFICIAL) / f"{name}.gz").read_bytes()))
    assert data.load("fashion-mnist", "test", tmp_path).name == "Fashion-MNIST"


def test_other_files_get_numbers_for_names(digits, monkeypatch):
    monkeypatch.setenv("FASHION_MNIST_DIR", str(digits))
    found = data.load("auto", "train")
    assert (found.images.shape, found.labels.tolist()) == ((20, 12, 8), [0, 1, 2, 3] * 5)
    assert (found.classes, found.name) == (("0", "1", "2", "3"), "digits")
    found.images[:] = 0  # the array is writable
    (digits / "t10k-labels-idx1-ubyte").write_bytes(idx(np.zeros(8, np.uint8)))
    assert data.load("fashion-mnist", "test", digits).classes == found.classes


def test_other_files_in_the_download_folder_are_used_too(digits, monkeypatch):
    monkeypatch.setattr(fashion_mnist, "CACHES", (digits, digits))
    assert data.load("auto", "train").name == data.load("fashion-mnist", "test", download=False).name == "digits"


def test_a_label_that_no_image_has_is_no_class(digits):
    """EMNIST's letters are 1 to 26."""
    labels = digits / "train-labels-idx1-ubyte", digits / "t10k-labels-idx1-ubyte"
    labels[0].write_bytes(idx(np.uint8([3, 7, 26, 7] * 5)))
    labels[1].write_bytes(idx(np.uint8([26, 3] * 4)))
    train, test = (data.load("auto", split, digits) for split in data.SPLITS)
    assert train.classes == test.classes == ("3", "7", "26")
    assert train.labels.tolist() == [0, 1, 2, 1] * 5 and test.labels.tolist() == [2, 0] * 4
    labels[1].write_bytes(idx(np.uint8([26, 4] * 4)))
    with pytest.raises(data.DataError, match=r"labels that no training image has: \[4\]"):
        data.load("auto", "test", digits)


@pytest.mark.parametrize("new", ["{}", "{stem}/{}", "raw/{}", "FashionMNIST/raw/{}", "digits/{stem}/{}"])
@pytest.mark.parametrize("dot", [False, True])
def test_files_under_nearly_the_right_names(digits, new, dot):
    """Named as other pages and programs name them, or each in its own folder, as Kaggle's archive unpacks."""
    for path in [*digits.iterdir()]:
        name = path.name.replace("-idx", ".idx") if dot else path.name
        target = digits / new.format(name, stem=name.removesuffix(".gz"))
        path.rename(path.with_name("moved"))
        target.parent.mkdir(parents=True, exist_ok=True)
        path.with_name("moved").rename(target)
    for split, n in (("train", 20), ("test", 8)):
        found = data.load("auto", split, digits)
        assert found.images.shape == (n, 12, 8) and found.name == "digits"


def test_the_message_about_wrong_file_names_gives_the_right_ones(tmp_path):
    (tmp_path / "emnist-letters-train-images-idx3-ubyte.gz").write_bytes(b"")
    with pytest.raises(data.DataError, match=r"or train-images-idx3-ubyte, .*; it contains emnist-letters-train-im"):
        data.load("auto", "train", tmp_path)


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda content: content[:-1], "match its header"),
        (lambda content: content + b"x", "match its header"),
        (lambda content: content[:6], "not an IDX file"),
        (lambda content: b"", "nothing"),
        (lambda content: b"<html>404</html>", "not an IDX file"),
        (lambda content: idx(np.zeros(20, np.uint8)), "not an IDX file of uint8 images"),
        (lambda content: idx(np.zeros((0, 12, 8), np.uint8)), "match its header"),
        (lambda content: idx(np.zeros((19, 12, 8), np.uint8)), "19 train images but 20 labels"),
        (lambda content: bytes((0, 0, 8, 3)) + b"\xff" * 12 + content[16:], "match its header"),
        (lambda content: bytes((0, 0, 13, 3)) + content[4:], "not an IDX file"),
        (lambda content: gzip.compress(content)[:-4], "cannot be read"),
        (lambda content: gzip.compress(content)[:10] + b"\xff" * 40, "cannot be read"),
        (lambda content: b"\x1f\x8b garbage", "cannot be read"),
    ],
)
def test_a_damaged_file_is_reported_in_one_clear_line(digits, damage, complaint):
    path = digits / TRAIN_IMAGES
    path.write_bytes(damage(gzip.decompress(path.read_bytes())))
    with pytest.raises(data.DataError, match=complaint) as caught:
        data.load("auto", "train", digits)
    assert "\n" not in str(caught.value)
    assert str(digits) in str(caught.value)


def test_every_truncation_is_noticed(digits):
    path = digits / TRAIN_IMAGES
    for content in (path.read_bytes(), gzip.decompress(path.read_bytes())):
        for length in (*range(24), *range(24, len(content), 60), len(content) - 9, len(content) - 1):
            path.write_bytes(content[:length])
            with pytest.raises(data.DataError):
                data.load("auto", "train", digits)
    path.unlink()
    with pytest.raises(data.DataError, match="no train-images-idx3-ubyte"):
        data.load("auto", "train", digits)


def test_a_gzip_bomb_is_not_unpacked(digits):
    """Almost endless zeros, behind a header that promises only a few."""
    with gzip.open(digits / TRAIN_IMAGES, "wb", compresslevel=1) as file:
        file.write(idx(np.zeros((20, 12, 8), np.uint8)))
        file.write(bytes(1 << 26))
    tracemalloc.start()
    message = r"damaged: its size doesn't match its header \(20 × 12 × 8 bytes of data\)"
    with pytest.raises(data.DataError, match=message):
        data.load("fashion-mnist", "train", digits)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10e6


@pytest.mark.parametrize(("name", "split"), [("mnist", "train"), ("garments", "validation")])
def test_unknown_names_are_refused(name, split):
    with pytest.raises(ValueError, match="fashion-mnist"):
        data.load(name, split)


# Downloads, from hosts on this machine.
@pytest.fixture
def host(digits, tmp_path, monkeypatch):
    """Serve `digits` (both files gzipped) as if they were the official files; the cache is an empty folder."""
    labels = gzip.compress((digits / "train-labels-idx1-ubyte").read_bytes())
    (digits / "train-labels-idx1-ubyte.gz").write_bytes(labels)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=digits)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()  # polls often, so it soon stops
    monkeypatch.setattr(fashion_mnist, "CACHES", (tmp_path / "cache", tmp_path / "home"))
    monkeypatch.setattr(fashion_mnist, "HOSTS", (f"http://127.0.0.1:{server.server_port}/",))
    packed = {name: (digits / f"{name}.gz").read_bytes() for name in fashion_mnist.FILES["train"]}
    versions = {name: (content, gzip.decompress(content)) for name, content in packed.items()}
    sums = {name: [hashlib.sha256(content).hexdigest() for content in pair] for name, pair in versions.items()}
    monkeypatch.setattr(fashion_mnist, "SHA256", sums)
    yield fashion_mnist.HOSTS[0]
    server.shutdown()
    server.server_close()


def test_a_download_is_checked_kept_and_not_repeated(host, digits, monkeypatch, capsys):
    impostor, true_name = b"digits under the same name", TRAIN_IMAGES.removesuffix(".gz")
    (digits / "impostor").mkdir()
    (digits / "impostor" / TRAIN_IMAGES).write_bytes(impostor)
    expected, got = fashion_mnist.SHA256[true_name][0], hashlib.sha256(impostor).hexdigest()
    monkeypatch.setattr(fashion_mnist, "HOSTS", (f"{host}impostor/",))
    with pytest.raises(data.DataError, match=f"expected SHA-256 {expected}, got {got}"):
        data.load("fashion-mnist", "train")
    assert list(fashion_mnist.CACHES[0].glob("*")) == []

    capsys.readouterr()
    monkeypatch.setattr(fashion_mnist, "HOSTS", (f"{host}impostor/", host))
    first = data.load("auto", "train")
    assert first.name == "Fashion-MNIST"
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "impostor/train-images" in line]
    assert expected in line and got in line
    assert {path.name for path in fashion_mnist.CACHES[0].iterdir()} == {f"{name}.gz" for name in fashion_mnist.SHA256}

    monkeypatch.setattr(fashion_mnist, "HOSTS", ())
    np.testing.assert_array_equal(data.load("fashion-mnist", "train").images, first.images)


ANSWER = b"HTTP/1.0 200 OK\r\n"


@pytest.mark.parametrize(
    ("answer", "again", "pause", "complaint"),
    [
        (ANSWER + b"Content-Length: 1000\r\n\r\nhalf of it", b"", 0, "SHA-256"),
        (ANSWER + b"Content-Length: many\r\n\r\nof it", b"", 0, "SHA-256"),
        (ANSWER + b"\r\n<html>Not found</html>", b"", 0, "SHA-256"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nx\r\n", b"", 0, "IncompleteRead"),
        (b"HTTP/1.0 302 Found\r\nLocation: /\r\n\r\n", b"", 0, "infinite loop"),
        (b"HTTP/1.0 503 Busy\r\n\r\n", b"", 0, "503"),
        (b"SSH-2.0 no web server\r\n", b"", 0, "SSH-2.0"),
        (b"", b"", 0, "closed connection"),
        (b"", b"", 60, "timed out"),
        (ANSWER + b"\r\nhalf of it", b"", 60, "timed out"),
        (ANSWER + b"\r\n", b"x", 0.05, "too slow"),
        (ANSWER + b"\r\n" + bytes(300_000), b"x", 0.05, "too slow"),
        (ANSWER + b"\r\n", bytes(1 << 20), 0, "more than"),
    ],
)
def test_a_misbehaving_host_is_abandoned(host, tmp_path, monkeypatch, answer, again, pause, complaint):
    """The host sends `answer`, then `again` without end, after a pause each time; the next host has the files."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self):
            self.request.recv(1000)
            with contextlib.suppress(OSError):  # until the other side has had enough
                self.request.sendall(answer)
                time.sleep(pause)
                while again:
                    self.request.sendall(again)
                    time.sleep(pause)

    slow = complaint in ("too slow", "timed out")  # a good answer gets enough time, however busy the machine is
    fetch = fashion_mnist.fetch

    def fetch_patiently(url):
        monkeypatch.setattr(fashion_mnist, "PATIENCE", 0.3 if slow and url.startswith(bad) else 60)
        return fetch(url)

    monkeypatch.setattr(fashion_mnist, "fetch", fetch_patiently)
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads, server.block_on_close = True, False
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        bad = f"http://127.0.0.1:{server.server_address[1]}/"
        monkeypatch.setattr(fashion_mnist, "HOSTS", (bad,))
        with pytest.raises(data.DataError, match=complaint) as caught:
            data.load("fashion-mnist", "train")
        assert "\n" not in str(caught.value)
        assert list(fashion_mnist.CACHES[0].glob("*")) == []
        monkeypatch.setattr(fashion_mnist, "HOSTS", (bad, host))
        assert data.load("fashion-mnist", "train").name == "Fashion-MNIST"
        server.shutdown()


@pytest.mark.parametrize("writable", [True, False])
def test_a_read_only_project_downloads_to_the_users_cache(host, tmp_path, monkeypatch, writable):
    """If that is read-only too, nothing is downloaded."""
    (tmp_path / "a file").write_text("so no folder can be made in it")
    caches = tmp_path / "a file" / "cache", tmp_path / "home" / ".cache" if writable else tmp_path / "a file"
    monkeypatch.setattr(fashion_mnist, "CACHES", caches)
    if writable:
        first = data.load("fashion-mnist", "train")
        monkeypatch.setattr(fashion_mnist, "HOSTS", ())
        np.testing.assert_array_equal(data.load("fashion-mnist", "train").images, first.images)
    else:
        monkeypatch.setattr(fashion_mnist, "fetch", None)
        with pytest.raises(fashion_mnist.DownloadError, match="can be written to"):
            data.load("fashion-mnist", "train")


def test_without_a_network_synthetic_garments_are_used(monkeypatch, tmp_path, capsys):
    monkeypatch.delenv("FASHION_MNIST_DIR", raising=False)
    monkeypatch.setattr(fashion_mnist, "CACHES", (tmp_path, tmp_path))
    monkeypatch.setattr(fashion_mnist, "HOSTS", ("http://127.0.0.1:9/",))
    monkeypatch.setitem(garments.SPLITS, "test", 20)
    assert data.load("auto", "test").name == "garments"
    assert "using synthetic garments instead" in capsys.readouterr().out
    assert data.load("auto", "test", download=False).name == "garments"  # nobody needs a message then
    assert capsys.readouterr().out == ""
    with pytest.raises(data.DataError, match="could not be downloaded"):
        data.load("fashion-mnist", "test")


# Your own pictures
def write_pictures(folder, n_classes=10, each=10):
    """Grey squares on black, PNG and JPEG in turn, larger from class to class and lighter from picture to picture."""
    for label, i in itertools.product(range(n_classes), range(each)):
        path = folder / f"class {label}" / f"{i:02}.{('png', 'JPG')[i % 2]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.zeros((40, 40), np.uint8)
        pixels[: 3 * label + 8, : 3 * label + 8] = 100 + 5 * i
        Image.fromarray(pixels).save(path)
    return folder


def test_folders_of_pictures(tmp_path, monkeypatch, capsys):
    folder = write_pictures(tmp_path / "squares")
    (folder / "class 3" / "notes.txt").write_text("no picture")
    (folder / ".hidden").mkdir()
    (folder / "readme.png").write_text("beside the classes, so not asked for")
    train, test = (data.load("auto", split, folder) for split in data.SPLITS)
    assert train.classes == test.classes == tuple(f"class {label}" for label in range(10))
    assert train.name == test.name == "squares"
    assert train.images.shape == (90, 28, 28) and test.images.shape == (10, 28, 28)
    assert train.images.dtype == np.uint8 and train.labels.dtype == np.int64
    assert train.labels.tolist() == sorted(9 * list(range(10))) and test.labels.tolist() == list(range(10))
    assert np.abs(train.images[:, 0, 0].reshape(10, 9) - np.arange(100.0, 145, 5)).max() < 8  # JPEG
    assert np.abs(test.images[:, 0, 0] - 145.0).max() < 8
    assert not train.images[train.labels == 5, 18:].any()  # 23 of 40 pixels are 16.1 of 28
    monkeypatch.setenv("FASHION_MNIST_DIR", str(folder))
    np.testing.assert_array_equal(data.load(split="test").images, test.images)
    assert capsys.readouterr().out == "squares: 2 other files skipped (.png, .txt)\n"  # once


def build(folder, *paths):
    """A folder with files at these paths, whose parts are separated by "/". "3 a/x.png" stands for three of them."""
    for path in paths:
        count, _, path = path.rpartition(" ")
        for i in range(int(count or 1)):
            file = (folder / path).with_stem(f"{Path(path).stem} {i}" if count else Path(path).stem)
            file.parent.mkdir(parents=True, exist_ok=True)
            if file.suffix.lower() in pictures.SUFFIXES:
                Image.fromarray(np.uint8([[0, 255], [128, 40]])).save(file)
            else:
                file.write_text("something else")
    return folder


@pytest.mark.parametrize(
    ("paths", "train", "test"),
    [
        (["3 x.png"], {"mine": 2}, {"mine": 1}),
        (["20 x.jpg", "read.me"], {"mine": 18}, {"mine": 2}),
        (["2 cats/x.png"], {"cats": 1}, {"cats": 1}),
        (["12 training/0/x.png", "2 training/1/x.png"], {"0": 11, "1": 2}, {"0": 1}),
        (["read.me", "2 set/raw/a/x.png", "set/raw/b/x.png", "__MACOSX/set/._a.png"], {"a": 1, "b": 1}, {"a": 1}),
        (["12 train/a/x.png", "train/b/x.png", "test/a/x.png", "test/b/x.png"], {"a": 12, "b": 1}, {"a": 1, "b": 1}),
        (["12 Training/a/x.png", "train.txt", "3 Validation/a/x.png"], {"a": 12}, {"a": 3}),
        (["set/train/a/x.png", "2 set/val/a/x.png", "set/test/a/x.png"], {"a": 1}, {"a": 1}),
        (["12 train/x.png", "2 test/x.png"], {"mine": 12}, {"mine": 2}),
        (["2 train/x.png", "test/x.png", "bus/x.png"], {"bus": 1, "test": 1, "train": 1}, {"train": 1}),
        (["2 a/x.png", "a/x.mpg", "x.h5", "b/x.png", "b/x.eps"], {"a": 1, "b": 1}, {"a": 1}),
        (["3 a/x.webp", "a/x.gif", "a/x.bmp", "a/x.tif", "a/x.JPG", "b/x.png"], {"a": 6, "b": 1}, {"a": 1}),
        (["2 a/x.png", "b/x.png", ".git/x.png", "b/.ipynb_checkpoints/x.png"], {"a": 1, "b": 1}, {"a": 1}),
    ],
)
def test_layouts_that_people_have(tmp_path, paths, train, test):
    folder = build(tmp_path / "mine", *paths)
    for split, counts in (("train", train), ("test", test)):
        found = data.load("auto", split, folder)
        assert found.classes == tuple(train) and found.name == "mine"
        assert np.bincount(found.labels, minlength=len(train)).tolist() == [counts.get(name, 0) for name in train]
        assert found.images.shape == (len(found.labels), 28, 28)


@pytest.mark.parametrize(
    ("paths", "complaint"),
    [
        (
            ["40 a/x.heic", "b/x.heic"],
            r"mine: needs one subfolder of images per class, or .*; it contains a/x 0.heic, a/x 1.heic, ",
        ),
        (["fashion-mnist_train.csv"], r"it contains fashion-mnist_train\.csv"),
        ([".hidden"], r"it contains \.hidden"),
        (["2 a/x.png", "b/x.heic"], r"b: no readable image; each class folder needs at least one"),
        (
            ["2 train/a/x.png", "test/b/x.png"],
            "mine: test images of class b, but no such training images; to use the training images alone",
        ),
        (["2 train/a/x.png", "test/x.png"], "mine: test images without a class folder, but no such training images"),
        (["2 train/a/x.png", "test/x.txt"], r"test: needs one subfolder of images"),
    ],
)
def test_layouts_that_are_refused(tmp_path, paths, complaint):
    with pytest.raises(data.DataError, match=complaint):
        data.load("auto", "train", build(tmp_path / "mine", *paths))


def test_skipped_files_and_lost_contrast_are_reported(tmp_path, capsys):
    folder = build(tmp_path / "mine", "3 a/x.png", "40 a/y.heic", "b/x.png", "deeper/c/x.png", "deeper/x.png")
    build(folder, "b/.ipynb_checkpoints/x.png", ".git/config", "licence")
    Image.fromarray(np.full((9, 9), 4095, np.uint16)).save(folder / "a" / "twelve bits.png")
    line = np.zeros((9, 9, 4), np.uint8)
    line[4, :, 3] = 255
    Image.fromarray(line).save(folder / "b" / "black on nothing.png")
    assert data.load("auto", "train", folder).images.shape == (6, 28, 28)
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "mine: 42 other files skipped (.heic, .png, no suffix)"
    assert said[1:] == ["mine: 2 of 7 images come out almost uniformly grey, such as twelve bits.png"]


def test_all_broken_pictures_are_named_at_once(tmp_path):
    """Held-out ones too. The message names ten, and says how many more there are."""
    folder = write_pictures(tmp_path / "squares", 1, 30)
    for i in range(9, 30):
        (folder / "class 0" / f"{i:02}.{('png', 'JPG')[i % 2]}").write_bytes(b"no picture")
    for split in data.SPLITS:
        with pytest.raises(
            data.DataError, match=r"09.JPG: can't be read .*; .*18.png: can't .*; and 11 more$"
        ) as caught:
            data.load("auto", split, folder)
        assert str(caught.value).count("can't be read") == 10


@pytest.mark.parametrize("values", [[0.0, 0.5, 1.0], [0, 70_000], [-5, 5], [float("nan"), 1]])
def test_values_that_are_no_grey_levels_are_refused(tmp_path, values):
    (tmp_path / "a").mkdir()
    kind = np.float32 if isinstance(values[0], float) else np.int32
    Image.fromarray(np.array([values], kind)).save(tmp_path / "a" / "x.tif")
    message = "its values are not whole numbers from 0 to 65,535; save it with 8 or 16 bits"
    with pytest.raises(data.DataError, match=message):
        data.load("auto", "train", tmp_path)


def test_a_link_to_nothing_is_named_like_a_broken_picture(tmp_path):
    build(tmp_path, "2 a/x.png")
    (tmp_path / "a" / "y.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(data.DataError, match=r"y.png: can't be read as an image \(.*No such file"):
        data.load("auto", "train", tmp_path)


def test_names_in_another_encoding_can_be_printed(tmp_path):
    folder = build(tmp_path / os.fsdecode(b"m\xffne"), "2 a/x.png", "b/x.png")
    (folder / "b").rename(folder / os.fsdecode(b"b\xe9"))
    found = data.load("auto", "train", folder)
    assert (found.name, found.classes) == ("m?ne", ("a", "b?"))
    assert found.images.shape == (2, 28, 28)


def test_a_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    build(tmp_path / "mine", "2 a/x.png")
    assert data.load("auto", "train", "~/mine").name == "mine"


def test_large_photos_are_read_at_a_fraction_of_their_size(tmp_path, monkeypatch):
    """And only once for both splits, unless a file changes."""
    (tmp_path / "a").mkdir()
    y, x = np.mgrid[:2000, :3000]
    for i in range(2):
        Image.fromarray((y / 20 + (x + 100 * i) / 24).astype(np.uint8)).save(tmp_path / "a" / f"{i}.jpg")
    sizes, pad = [], pictures.ImageOps.pad
    monkeypatch.setattr(pictures.ImageOps, "pad", lambda image, size: sizes.append(image.size) or pad(image, size))
    train, test = (data.load("auto", split, tmp_path).images for split in data.SPLITS)
    assert sizes == [(375, 250)] * 2  # an eighth
    expected = (np.arange(28) + 0.5) * 125 / 28  # in a row
    for image, offset in ((train[0], 0), (test[0], 100 / 24)):
        assert np.abs(image[14, 1:-1] - 52.7 - offset - expected[1:-1]).max() < 3
    os.utime(tmp_path / "a" / "1.jpg", (1, 1))
    data.load("auto", "test", tmp_path)
    assert len(sizes) == 4


@pytest.mark.parametrize(("n_classes", "each", "held_out"), [(1, 1, 0), (2, 1, 0), (3, 4, 1), (1, 29, 2)])
def test_at_least_one_picture_is_held_out(tmp_path, n_classes, each, held_out):
    """But never a class's only one."""
    train, test = (data.load("auto", split, write_pictures(tmp_path, n_classes, each)) for split in data.SPLITS)
    assert len(test.images) == (held_out or n_classes)
    assert len(train.images) == n_classes * each - held_out
    assert set(train.labels.tolist()) == set(range(n_classes))


def transparent():
    """Half white, half transparent red."""
    pixels = np.full((10, 20, 4), 255, np.uint8)
    pixels[:, 10:] = 255, 0, 0, 0
    return Image.fromarray(pixels)


def upside_down():
    exif = Image.Exif()
    exif[0x0112] = 3
    return {"exif": exif}


WHITE = Image.fromarray(np.repeat([np.repeat(np.uint8([255, 0]), 10)], 10, axis=0))  # the left half of 10 × 20 pixels
SIXTEEN = Image.fromarray(np.asarray(WHITE).astype(np.uint16) * 257)


@pytest.mark.parametrize(
    ("name", "picture", "options", "coloured"),
    [
        ("x.png", WHITE, {}, False),
        ("x.PNG", WHITE.convert("1"), {}, False),
        ("x.png", WHITE.convert("LA"), {}, False),
        ("x.png", WHITE.convert("P"), {}, False),
        ("x.png", transparent(), {}, False),
        ("x.png", transparent().quantize(), {}, False),
        ("x.png", SIXTEEN, {}, False),
        ("x.jpeg", WHITE.convert("RGB").convert("CMYK"), {"quality": 100}, False),
        ("x.JPG", WHITE.rotate(180), upside_down() | {"quality": 100}, False),
        ("x.png", Image.merge("RGB", [WHITE, WHITE.point(lambda _: 0), WHITE.point(lambda _: 0)]), {}, True),
    ],
)
def test_pictures_become_grey_upright_and_fitted(tmp_path, capsys, name, picture, options, coloured):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "._x.png").write_text("hidden, as some systems have them beside each picture")
    picture.save(tmp_path / "a" / name, **options)
    (images,) = data.load("auto", "train", tmp_path).images
    expected = np.zeros((28, 28))
    expected[7:21, :14] = 76 if coloured else 255  # the luminance of red
    inside = [*range(12), *range(16, 28)]  # not where light and dark meet
    assert np.abs(images - expected)[:6].max() == np.abs(images - expected)[22:].max() == 0
    assert np.abs(images - expected)[9:19, inside].max() <= 3
    assert ("1 of 1 images converted from colour" in capsys.readouterr().out) == coloured


def test_files_in_the_format_of_fashion_mnist_come_before_pictures(digits):
    write_pictures(digits, 2, 2)
    (digits / "notes").mkdir()
    assert data.load("auto", "train", digits).images.shape == (20, 12, 8)


@pytest.mark.parametrize("content", [b"", b"no picture", "cut"])
def test_a_broken_picture_is_named(tmp_path, content):
    write_pictures(tmp_path, 2, 3)
    whole = (tmp_path / "class 1" / "00.png").read_bytes()
    (tmp_path / "class 1" / "broken.png").write_bytes(whole[:-30] if content == "cut" else content)
    with pytest.raises(data.DataError, match=r"class 1/broken.png: can't be read"):
        data.load("auto", "train", tmp_path)


@pytest.mark.filterwarnings("ignore:Tag data larger than file")
def test_damaged_pictures_are_refused_or_read(tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 9, 3), np.uint8))
    for name, options in (("x.jpg", upside_down()), ("x.png", {})):
        image.save(tmp_path / name, **options)
        good, random = (tmp_path / name).read_bytes(), np.random.default_rng(1)
        for at in random.integers(0, len(good), 150).tolist():
            (tmp_path / name).write_bytes(good[:at] + random.bytes(2) + good[at + 2 :])
            with contextlib.suppress(data.DataError):
                assert pictures.read(tmp_path / name)[0].shape == (28, 28)
