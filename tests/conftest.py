"""What the tests share. They run in two processes (pytest-xdist), each with one thread."""

import importlib
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch reads it

import numpy as np
import pytest
import torch

DIFFERENCES = pytest.StashKey()


@pytest.fixture(scope="session")
def lesson3():
    return importlib.import_module("03_unet_uncond")


@pytest.fixture(scope="session")
def lesson4():
    return importlib.import_module("04_unet_cond")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def redraw():
    """Redraw every weight, bias and norm parameter at random: zeroed branches would hide whatever is wrong in them."""

    def redraw(module):
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                is_gain = name.endswith("norm.weight")
                fan_in = parameter[0].numel() if parameter.ndim > 1 else 4
                parameter.normal_(mean=float(is_gain), std=fan_in**-0.5)
        return module

    return redraw


def remember(table, piece, precision, difference, tolerance):
    """Keep the largest difference of each piece in each precision."""
    row = table.setdefault(piece, {})
    row[precision] = max(difference, row.get(precision, (0, 0))[0]), tolerance


@pytest.fixture
def compare(request):
    """compare(piece, result, expected, tolerance): assert that no two numbers are further apart than the tolerance, and
    remember the largest difference for the table at the end.

    result: a tensor, or NumPy's or Python's numbers; expected: tensor or array of the same shape.
    """
    table = request.config.stash.setdefault(DIFFERENCES, {})

    def compare(piece, result, expected, tolerance):
        precision = str(result.dtype).removeprefix("torch.") if torch.is_tensor(result) else "float64"
        result, expected = (
            side.detach().double().numpy() if torch.is_tensor(side) else np.asarray(side) for side in (result, expected)
        )
        assert result.shape == expected.shape
        difference = np.abs(result - expected).max()
        remember(table, piece, precision, float(difference), tolerance)
        assert difference <= tolerance, f"{piece}: {difference:.1e} apart, {tolerance:.0e} allowed"
        assert np.abs(expected).max() > 100 * tolerance, f"{piece}: too small to be compared"

    return compare


def pytest_sessionfinish(session):
    """A process that tests hands its table to the one that waits for it."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["differences"] = session.config.stash.get(DIFFERENCES, {})


def pytest_testnodedown(node):
    table = node.config.stash.setdefault(DIFFERENCES, {})
    for piece, row in node.workeroutput.get("differences", {}).items():
        for precision, (difference, tolerance) in row.items():
            remember(table, piece, precision, difference, tolerance)


def pytest_terminal_summary(terminalreporter, config):
    table = config.stash.get(DIFFERENCES, {})
    if table:
        width = max(map(len, table))
        terminalreporter.section("largest differences (allowed)")
        for piece, row in sorted(table.items()):
            cells = (
                "{}  {:.0e} ({:.0e})".format(precision, *row[precision]) for precision in sorted(row, reverse=True)
            )
            terminalreporter.write_line(f"{piece:{width}}  {'   '.join(cells)}")
