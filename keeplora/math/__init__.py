"""Pure tensor functions on subspaces, batched over layers. Nothing is changed in place."""

from keeplora.math.lowrank import Extension, TopDirections, extend_basis, top_directions, weight_basis
from keeplora.math.orthonormal import complement, reorthogonalize
from keeplora.math.rank import fewest_directions
from keeplora.math.subspace import Certificate, certificate, certificates, orthogonality, project

__all__ = [
    "Certificate",
    "Extension",
    "TopDirections",
    "certificate",
    "certificates",
    "complement",
    "extend_basis",
    "fewest_directions",
    "orthogonality",
    "project",
    "reorthogonalize",
    "top_directions",
    "weight_basis",
]
