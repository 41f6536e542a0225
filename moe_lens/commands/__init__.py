"""One file a subcommand of `moe-lens`. They import what is heavy when they run, never before."""
