"""What a person types: one file per verb, heavy imports inside the verb."""
