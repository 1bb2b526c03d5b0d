"""Search engines for nearest vectors: exact and in this process, or an engine for those who outgrow that."""
