"""*On Ray*: the same nouns on a cluster. The only folder that imports ray."""
