"""What the cache saves on this machine: stock and patched Moshi side by side, without weights."""
