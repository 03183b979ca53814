"""Fashion-MNIST (Xiao et al. 2017), or any data set in its file format: find or download the files, and check them."""

import contextlib
import gzip
import hashlib
import http.client
import os
import tempfile
import time
import urllib.request
import zlib
from pathlib import Path

import numpy as np
from tqdm import tqdm

CLASSES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
HOME = os.environ.get("HOME") or os.environ.get("USERPROFILE") or tempfile.gettempdir()
CACHES = (Path(__file__).parent / "fashion_mnist", Path(HOME) / ".cache" / "fashion_mnist")  # for downloads
HOSTS = (
    "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
)
MOST_BYTES = 2**31  # of pixels in a file: a header that promises more is damaged
MOST_FETCHED = 2**25  # bytes per download
SLOWEST = 10_000  # bytes/s
PATIENCE = 20  # seconds: the longest silence, and the time over which the speed is averaged
# each split's files (images, labels); each file's SHA-256: gzipped, as distributed, then unpacked
FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
SHA256 = {
    "train-images-idx3-ubyte": (
        "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
        "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    ),
    "train-labels-idx1-ubyte": (
        "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
        "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    ),
    "t10k-images-idx3-ubyte": (
        "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
        "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    ),
    "t10k-labels-idx1-ubyte": (
        "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
        "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    ),
}


class DataError(Exception):
    """The requested data is unavailable; the message is one line that says why, and what to do."""


class DownloadError(DataError):
    """Fashion-MNIST could not be downloaded: not allowed, no writable folder, or no host with the right file."""


def load(split, folder, may_download=True):
    """Images, labels, class names, and the data set's name. If the files aren't the official ones, the name is None,
    and the classes are the labels that occur in the training set, as text: "0", "1", ...

    split: "train" or "test". folder: where the files are; None means the cache, which a download fills. Raises
    DataError if a file is missing or damaged; DownloadError if a download fails or isn't allowed (may_download).
    """
    if not folder:
        folder = next((place for place in CACHES if all(find(place, name) for name in FILES[split])), None)
        if not folder and not may_download:
            raise DownloadError(f"{CACHES[0]}: Fashion-MNIST isn't there")
        folder = folder or choose_cache()
        for name in FILES[split]:
            if not find(folder, name):
                download(name, folder)
    contents = [read(folder, name, dimensions) for name, dimensions in zip(FILES[split], (3, 1), strict=True)]
    images, labels = (array for array, _ in contents)
    if len(images) != len(labels):
        raise DataError(f"{folder}: {len(images)} {split} images but {len(labels)} labels; each image needs one")
    if all(digest == SHA256[name][1] for (_, digest), name in zip(contents, FILES[split], strict=True)):
        return images, labels.astype(np.int64), CLASSES, "Fashion-MNIST"
    numbers = np.unique(labels if split == "train" else read(folder, FILES["train"][1], 1)[0])
    if unknown := {*labels.tolist()} - {*numbers.tolist()}:
        raise DataError(f"{folder}: test images have labels that no training image has: {sorted(unknown)}")
    return images, np.searchsorted(numbers, labels), tuple(map(str, numbers)), None


def find(folder, name):
    """The file's path, or None. It may be gzipped or plain, with ".idx" instead of "-idx" in its name, and in a folder
    named after it (as in Kaggle's archive)."""
    names = (name, name.replace("-idx", ".idx"))
    paths = [folder / place / f"{stem}{end}" for stem in names for place in (".", stem) for end in (".gz", "")]
    return next((path for path in paths if path.is_file()), None)


def is_in(folder):
    """Whether the folder holds any of the files."""
    return any(find(folder, name) for names in FILES.values() for name in names)


def choose_cache():
    """The first writable folder for downloads. Raises DownloadError if there is none."""
    for folder in CACHES:
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
            return folder
    raise DownloadError(f"can't download Fashion-MNIST: neither {CACHES[0]} nor {CACHES[1]} can be written to")


def read(folder, name, dimensions):
    """One IDX file as a uint8 array of that many dimensions, and the SHA-256 of its unpacked bytes.

    The format: two zero bytes, the type (8 is uint8), the number of dimensions, each size as a big-endian int32, data.
    """
    path = find(folder, name)
    if path is None:
        raise DataError(f"{folder}: no {name}.gz (or {name}); all four Fashion-MNIST files must be there")
    length = 4 + 4 * dimensions  # of the header
    try:
        with path.open("rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
        with gzip.open(path) if packed else path.open("rb") as file:
            header = file.read(length)
            if header[:4] != bytes((0, 0, 8, dimensions)) or len(header) < length:
                raise DataError(
                    f"{path}: not an IDX file of uint8 {'images' if dimensions == 3 else 'labels'}: "
                    f"it begins with {header[:4].hex(' ') or 'nothing'} instead of 00 00 08 {dimensions:02x}"
                )
            shape = tuple(np.frombuffer(header, ">u4", dimensions, offset=4).tolist())
            expected = int(np.prod(shape, dtype=object))
            content = file.read(expected + 1) if expected <= MOST_BYTES else b""  # the extra byte reveals an excess
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({error}). Download it again, or pass --data garments") from error
    if len(content) != expected or expected == 0:
        size = " × ".join(map(str, shape))
        raise DataError(
            f"{path}: damaged: its size doesn't match its header ({size} bytes of data). Download it again, or pass "
            "--data garments"
        )
    # a copy, so that the array can be written to and does not keep the file's bytes alive
    array = np.frombuffer(content, np.uint8).reshape(shape).copy()
    return array, hashlib.sha256(header + content).hexdigest()


def download(name, folder):
    """Fetch one file into the folder from the first host that has the right one. Raises DownloadError if none has."""
    (expected, _), path, troubles = SHA256[name], folder / f"{name}.gz", []
    for host in HOSTS:
        url = f"{host}{name}.gz"
        try:
            content = fetch(url)
            if (digest := hashlib.sha256(content).hexdigest()) == expected:
                return keep(content, path)
        except (OSError, http.client.HTTPException) as error:
            troubles.append(f"{url}: {' '.join(str(error).split())}")
        else:
            troubles.append(f"{url}: expected SHA-256 {expected}, got {digest}: a different file under that name")
            print(troubles[-1])
    raise DownloadError("Fashion-MNIST could not be downloaded (" + "; ".join(troubles) + ")")


def fetch(url):
    """The bytes at url. Raises OSError or HTTPException if they are unavailable, too many, or too slow."""
    received, before, checked = bytearray(), 0, time.monotonic()
    options = {"desc": url.rpartition("/")[2], "unit": "B", "unit_scale": True, "leave": False}
    with urllib.request.urlopen(url, timeout=PATIENCE) as response, tqdm(total=response.length, **options) as bar:
        while chunk := response.read1(1 << 16):  # whatever has arrived, without waiting for more
            received += chunk
            bar.update(len(chunk))
            if len(received) > MOST_FETCHED:
                raise OSError(f"more than {MOST_FETCHED:,} bytes")
            if time.monotonic() > checked + PATIENCE:
                if len(received) < before + SLOWEST * PATIENCE:
                    raise OSError(f"too slow: under {SLOWEST:,} bytes/s")
                before, checked = len(received), time.monotonic()
    return bytes(received)


def keep(content, path):
    """Write a file, all or nothing, creating its folder if necessary."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        part.write_bytes(content)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
