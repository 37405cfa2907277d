import sys
from importlib.util import find_spec

import pytest
import torch

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])

if sys.version_info < (3, 11):
    import tomli

    sys.modules["tomllib"] = tomli

# They take longest, so they begin first; else one worker of `make test` ends with them while the other is idle.
LONGEST = ("test_packaging.py", "test_defects.py")

torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in LONGEST)
    if find_spec("peft") is None:  # of the tests of every method, those of methods that need it
        from keeplora.methods import METHODS

        peers = {name for name, entry in METHODS.items() if entry.build.__module__.startswith("keeplora.methods.peers")}
        for item in items:
            params = getattr(item, "callspec", None)
            if params is not None and peers & {value for value in params.params.values() if isinstance(value, str)}:
                item.add_marker(pytest.mark.skip("peft is not installed"))


@pytest.fixture(params=DEVICES)
def device(request):
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
