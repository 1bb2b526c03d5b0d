"""Ground floor: events, quantities, hashes, the cache, the machine, settings."""
