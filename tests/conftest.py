"""What the tests share. They run in two processes (pytest-xdist), each with one thread."""

import importlib
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch reads it

import numpy as np
import pytest
import torch


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
    """Redraw every weight, bias and norm parameter at random: zero-initialised branches would hide bugs."""

    def redraw(module):
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                is_gain = name.endswith("norm.weight")
                fan_in = parameter[0].numel() if parameter.ndim > 1 else 4
                parameter.normal_(mean=float(is_gain), std=fan_in**-0.5)
        return module

    return redraw


@pytest.fixture
def compare():
    """compare(piece, result, expected, tolerance): assert that no number is off by more than the tolerance.

    result: a tensor, or NumPy's or Python's numbers; expected: tensor or array of the same shape.
    """

    def compare(piece, result, expected, tolerance):
        result, expected = (
            side.detach().double().numpy() if torch.is_tensor(side) else np.asarray(side) for side in (result, expected)
        )
        assert result.shape == expected.shape
        difference = np.abs(result - expected).max()
        assert difference <= tolerance, f"{piece}: {difference:.1e} apart, {tolerance:.0e} allowed"
        assert np.abs(expected).max() > 100 * tolerance, f"{piece}: too small to be compared"

    return compare
