"""The parts that the scripts assemble: each module takes what it needs as arguments and keeps no global state."""
