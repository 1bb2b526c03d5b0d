"""What is kept between runs: the cache, journals, hashes, and the sources a key covers."""
