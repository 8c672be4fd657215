"""Artifacts: shards, trees, digests, manifests."""
