"""What the tests share."""

import importlib

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
    """Redraw every weight, bias and norm parameter at random: zeroed branches would hide whatever is wrong in them."""

    def redraw(module):
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                is_gain = name.endswith("norm.weight")
                fan_in = parameter[0].numel() if parameter.ndim > 1 else 4
                parameter.normal_(mean=float(is_gain), std=fan_in**-0.5)
        return module

    return redraw
