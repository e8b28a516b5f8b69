"""Programs that measure quality."""
