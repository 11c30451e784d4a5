"""The jobs of a table: planned, claimed, carried out, watched."""
