"""Whole runs, through the command line that a person types."""
