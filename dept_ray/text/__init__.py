"""*Text*: raw text becomes packed token shards, and shards become batches."""
