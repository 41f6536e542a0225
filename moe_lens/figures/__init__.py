"""One Plotly figure a file: the table of a stored question in, a `go.Figure` out."""
