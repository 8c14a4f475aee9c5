"""Hours of conversation at constant memory: a hierarchical cache for Moshi."""

from .adapter import load_adapter, save_adapter
from .cache import HierarchicalCache
from .config import CacheConfig
from .patch import Patch, adapter_parameters, patch, unpatch
from .report import report
from .session import load_session, save_session
from .state import CacheState
from .training.distill import distill
from .version import __version__

__all__ = [
    "CacheConfig",
    "CacheState",
    "HierarchicalCache",
    "Patch",
    "__version__",
    "adapter_parameters",
    "distill",
    "load_adapter",
    "load_session",
    "patch",
    "report",
    "save_adapter",
    "save_session",
    "unpatch",
]
