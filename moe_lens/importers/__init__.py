"""Other recorders' files into traces: one format a file, one way to check and to write them."""
