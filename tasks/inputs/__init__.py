"""What stages read: models, prompts, tokenizers, verifiers."""
