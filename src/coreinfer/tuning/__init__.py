"""Searching for the settings that keep a quality budget at the fewest bytes, or the reverse."""
