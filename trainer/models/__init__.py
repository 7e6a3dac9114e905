"""Networks as the trainer uses them: base models, adapters, placement and storage."""
