"""What a run looks like while it trains: sampling, rendering, the report."""
