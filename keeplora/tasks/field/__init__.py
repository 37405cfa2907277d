"""The field's benchmarks as data, and readers for their files where people already have them. Nothing is downloaded.

`image_benchmark("mtil")` tells orders, class names, templates, sizes and layouts; `read_images(root, …)` returns its
data sets. `instruction_benchmark("ucit")` and `read_instructions(root, …)` do the same for questions about images and
videos.
"""

from .captions import read_captions
from .catalog import (
    BENCHMARKS,
    DataSet,
    ImageBenchmark,
    InstructionBenchmark,
    InstructionTask,
    image_benchmark,
    instruction_benchmark,
)
from .images import ArrayImage, FileImage, ImageSet, Source, class_offsets, split_paths
from .instructions import InstructionSet, Question, read_instructions
from .read import read_image_set, read_images

__all__ = [
    "BENCHMARKS",
    "ArrayImage",
    "DataSet",
    "FileImage",
    "ImageBenchmark",
    "ImageSet",
    "InstructionBenchmark",
    "InstructionSet",
    "InstructionTask",
    "Question",
    "Source",
    "class_offsets",
    "image_benchmark",
    "instruction_benchmark",
    "read_captions",
    "read_image_set",
    "read_images",
    "read_instructions",
    "split_paths",
]
