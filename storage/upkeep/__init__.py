"""Collection, comparison, transfer of artifacts."""
