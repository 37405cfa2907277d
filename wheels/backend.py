"""The build backend: setuptools', which needs torch only where it compiles and finds none installed."""

from setuptools.build_meta import *  # noqa: F403

from wheels.plan import OLDEST_TORCH, find_torch, why_pure


def get_requires_for_build_sdist(config_settings: object = None) -> list[str]:
    return []


def get_requires_for_build_wheel(config_settings: object = None) -> list[str]:
    if why_pure():
        return []
    return ["ninja"] if find_torch() is not None else ["ninja", "torch>={}.{}".format(*OLDEST_TORCH)]


get_requires_for_build_editable = get_requires_for_build_wheel
