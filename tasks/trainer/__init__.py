"""The DeepSpeed worker. `config`, `launch` and `batching` import no engine; the rest runs in the worker only."""
