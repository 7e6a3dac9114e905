"""LoRaD: adapters that rotate the directions of weights and keep their norms. Needs torch and nothing of a host."""

from .adapter import Fused, LoRaD, Match, check_together, fuse
from .metadata import Metadata

__all__ = ["Fused", "LoRaD", "Match", "Metadata", "check_together", "fuse"]
