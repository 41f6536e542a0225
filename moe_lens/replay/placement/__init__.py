"""Which rank holds which experts, and what that costs: docs/placement.md."""
