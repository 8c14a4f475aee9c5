from .cache import HierarchicalCache
from .config import CacheConfig
