"""Callbacks for trainers, one file a library; each imports its own."""
