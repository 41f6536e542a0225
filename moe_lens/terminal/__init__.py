"""The page that `moe-lens report` prints: answers in, rich renderables out."""
