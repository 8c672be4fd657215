"""SQL over committed artifacts."""
