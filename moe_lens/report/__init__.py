"""What a report says of a run, and the HTML page that says it; `terminal` prints the same."""
