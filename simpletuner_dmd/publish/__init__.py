"""What leaves the run: adapter files, schedulers, model card, Hub upload, webhooks. Nothing here trains."""
