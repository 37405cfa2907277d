"""DAC: a pool of rank-1 experts per weight."""

from .method import Dac, DacConfig

__all__ = ["Dac", "DacConfig"]
