"""Identity, the artifact store, shards, schemas, runs and queries. No torch, no vLLM, no Prefect in here."""
