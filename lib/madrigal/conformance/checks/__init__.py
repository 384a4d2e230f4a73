"""The checks: test functions that the plug-in plays for each driver."""
