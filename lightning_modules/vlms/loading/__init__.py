"""Loading weights: base models, adapters, weight folders and FSDP2's sharding units."""
