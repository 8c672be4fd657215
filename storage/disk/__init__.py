"""Files, locks, redaction: what the rest of storage rests on."""
