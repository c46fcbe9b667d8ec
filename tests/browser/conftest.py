"""One JupyterLab for all tests that need one, and one browser for each file of them."""

import pytest
from lab import PICTURES, Lab, Server, browse


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    with Server(tmp_path_factory.mktemp("lab")) as server:
        yield server


@pytest.fixture(scope="module")  # no longer: playwright's event loop would be in the way of other files
def browser(chromium):
    PICTURES.mkdir(parents=True, exist_ok=True)
    with browse(chromium) as browser:
        yield browser


@pytest.fixture(scope="module")
def lab(server, browser):
    lab = Lab(server, browser)
    yield lab
    lab.end_kernels()
