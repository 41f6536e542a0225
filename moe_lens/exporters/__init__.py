"""Our traces in the formats of other tools: counts for placements, routing to replay."""
