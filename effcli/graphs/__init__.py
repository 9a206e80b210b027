"""Networks read as a graph: passes over them, integer networks and their executor, speed."""
