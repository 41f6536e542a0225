"""Questions asked of a trace: `session.Trace`, and one stored question a `.sql` file."""
