"""Plans the jobs of a table, carries them out, and shows how far they have come."""
