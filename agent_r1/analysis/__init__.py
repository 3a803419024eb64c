"""What came of a run, and what would: ``explain``, the report, ``check``."""
