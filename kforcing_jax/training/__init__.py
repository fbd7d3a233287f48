"""From text to a teacher, and from a teacher to students of doubling window."""
