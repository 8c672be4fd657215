"""One run: plan or make its stages, recover, replay, check."""
