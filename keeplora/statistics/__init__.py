"""What one pass over a task's data tells about every target: mean gradients, second moments of inputs."""

from .features import FeatureKind, FeatureStatistic, feature_statistics
from .gradients import mean_gradients, sketch_widths
from .passes import ALONE, BatchSize, Peers, batch_size_of, first_batches

__all__ = [
    "ALONE",
    "BatchSize",
    "FeatureKind",
    "FeatureStatistic",
    "Peers",
    "batch_size_of",
    "feature_statistics",
    "first_batches",
    "mean_gradients",
    "sketch_widths",
]
