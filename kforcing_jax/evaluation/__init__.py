"""How faithful students are, how good their samples are, and how that is shown."""
