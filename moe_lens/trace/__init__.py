"""The trace: schema, writer, reader. What writes a trace and what reads it meet only here."""
